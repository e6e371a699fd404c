"""The language model of a model of several modalities, by itself."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from recalkv_vllm.architectures import language_name
from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.errors import InputError
from tests.e2e.architectures import SIZES
from tests.e2e.multimodal import CONFIGS, save_multimodal_model
from tests.quantized_models import edit_config

IDS = torch.randint(3, 500, (1, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=CONFIGS)
def directory(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("multimodal")
    return save_multimodal_model(request.param, root / request.param)


def test_it_computes_what_it_does_within(directory):
    whole = AutoModelForImageTextToText.from_pretrained(directory).eval()
    alone = BaseModel(directory).load(torch.float32, "cpu").eval()
    with torch.no_grad():
        assert torch.equal(alone(IDS).logits, whole(input_ids=IDS).logits)


def test_defaults_that_a_file_leaves_out_are_filled_in(directory):
    model = BaseModel(directory)
    assert model.geometry.hidden_size == SIZES["hidden_size"]
    written = json.loads((directory / "config.json").read_text()).get("text_config")
    if written is None:
        pytest.skip("the language model's fields are the whole model's")
    few = {name: value for name, value in written.items() if name != "hidden_size"}
    edit_config(directory, text_config=few)
    try:
        assert BaseModel(directory).geometry.hidden_size > SIZES["hidden_size"]
    finally:
        edit_config(directory, text_config=written)


def test_it_is_not_spread(directory):
    with pytest.raises(InputError, match="of a language model alone"):
        BaseModel(directory).load(torch.float32, "spread")


@pytest.mark.parametrize("prefix", ["model.language_model", "language_model.model", "model"])
def test_names(prefix, directory):
    name = "layers.3.self_attn.k_proj.weight"
    assert language_name(f"{prefix}.{name}") == f"model.{name}"
    assert language_name("language_model.lm_head.weight") == "lm_head.weight"
    towers = [
        n for n in load_file(directory / "model.safetensors") if "tower" in n or "visual" in n
    ]
    assert towers
    assert [language_name(n) for n in towers] == towers
