"""A model spread over memory and disk is calibrated on as one that is whole."""

import json

import pytest
import torch

from recalkv_vllm.cli import main
from recalkv_vllm.compression.base_model import model
from recalkv_vllm.compression.base_model.devices import SPREAD
from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.calibration.statistics import collect
from recalkv_vllm.compression.errors import InputError

SAMPLES = torch.randint(1, 512, (12, 24), generator=torch.Generator().manual_seed(0))
#: As ``accelerate`` places a model of two layers where one and a half fit.
PLACES = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
}


def test_statistics_are_those_of_the_whole_model(tiny_models, geometry, monkeypatch):
    monkeypatch.setattr(model, "DEVICE_MAP", PLACES)
    found = []
    for device in ("cpu", SPREAD):
        loaded = BaseModel(tiny_models["llama_bias"]).load(torch.float32, device)
        found.append(
            collect({"kronecker"}, SAMPLES, geometry, device, lambda loaded=loaded: loaded)
        )
    assert loaded.model.layers[1].self_attn.k_proj.weight.is_meta
    whole, spread = found
    for layer in range(geometry.num_layers):
        expected, factors = whole.kronecker(layer), spread.kronecker(layer)
        torch.testing.assert_close(factors.inputs, expected.inputs)
        torch.testing.assert_close(factors.outputs, expected.outputs)


def test_compress(tiny, tmp_path, capsys):
    command = ["compress", str(tiny), "--compression", "0.5", "--num-samples", "4"]
    found = []
    for device in ("cpu", "spread"):
        out = tmp_path / device
        options = ["-o", str(out), "--device", device, "--seq-len", "64", "--json"]
        assert main([*command, *options, "--dtype", "float32"]) == 0
        found.append(json.loads(capsys.readouterr().out)["layers"])
    assert [layer["rank"] for layer in found[0]] == [layer["rank"] for layer in found[1]]


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "phi3"},
        {"model_type": "llama", "quantization_config": {"quant_method": "awq", "bits": 4}},
    ],
)
def test_weights_that_cannot_be_spread(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"--device spread: .* name one device"):
        BaseModel(tmp_path).load(torch.float32, SPREAD)
