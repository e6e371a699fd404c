"""Healing: what is trained is what is served."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from recalkv_vllm.checkpoint import RecalkvConfig, read_hf_config
from recalkv_vllm.compression import pipeline
from recalkv_vllm.compression.calibration.calibration_text import draw_text
from recalkv_vllm.compression.options import CompressOptions
from recalkv_vllm.compression.pipeline import compress
from recalkv_vllm.evaluation.transformers_engine import load_served

FEW = {"num_samples": 8, "seq_len": 32}


def likelihoods(directory, ids):
    with torch.no_grad():
        return load_served(directory)(ids).logits.log_softmax(dim=-1)


def written(directory):
    config = RecalkvConfig.from_hf_config(read_hf_config(directory))
    return config, load_file(directory / "model.safetensors")


@pytest.fixture
def held_out_samples_train(monkeypatch):
    """All samples: a tiny model of random weights has nothing that other text could teach."""
    kept = []

    def draw(job):
        text = draw_text(job)
        kept.append(text.held_out)
        return replace(text, training=text.held_out)

    monkeypatch.setattr(pipeline, "draw_text", draw)
    return kept


@pytest.mark.parametrize("method", ["kfac", "recalkv", "palu", "svd"])
def test_healed_checkpoint(make_model, tmp_path, method, held_out_samples_train):
    """Of every method: what is written predicts as what was trained did."""
    base = make_model("llama_bias", torch.float32)
    options = CompressOptions(str(base), tmp_path / "healed", 0.75, method=method, heal=40, **FEW)
    compress(options)
    (held_out,) = held_out_samples_train
    compress(replace(options, out=tmp_path / "plain", heal=0))
    config, tensors = written(tmp_path / "healed")
    unhealed, before = written(tmp_path / "plain")
    assert config.layers == unhealed.layers
    told = config.settings["healing"]
    assert (told["steps"], told["tokens"], told["weights"]) == (40, 40 * FEW["seq_len"], True)
    assert told["loss_after"] < 0.9 * told["loss_before"]
    for name in ("q", "k", "v", "o"):
        weight = f"model.layers.1.self_attn.{name}_proj.weight"
        assert not torch.equal(tensors[weight], before[weight]), name
    assert torch.equal(tensors["model.embed_tokens.weight"], before["model.embed_tokens.weight"])

    dense, healed, plain = (
        likelihoods(path, held_out) for path in (base, tmp_path / "healed", tmp_path / "plain")
    )
    for found, loss in ((healed, told["loss_after"]), (plain, told["loss_before"])):
        lost = F.kl_div(found, dense, log_target=True, reduction="sum") / held_out.numel()
        assert float(lost) == pytest.approx(loss, rel=1e-3)


def test_factors_alone_heal(make_model, tmp_path, held_out_samples_train):
    base = str(make_model("llama", torch.float32))
    options = CompressOptions(base, tmp_path / "out", 0.75, heal=40, factors_only=True, **FEW)
    compress(options)
    told = RecalkvConfig.from_hf_config(read_hf_config(tmp_path / "out")).settings["healing"]
    assert told["weights"] is False
    assert told["loss_after"] < 0.95 * told["loss_before"]
