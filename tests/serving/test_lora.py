"""Adapters that cannot act on a compressed model are refused by the module's name."""

import pytest
import torch
from safetensors.torch import save_file

from recalkv_vllm.checkpoint import LatentLayout
from recalkv_vllm.serving.startup.lora import check_adapter

SPANS = ((0, 16), (16, 32))
NATURAL = LatentLayout(32, 1, SPANS, SPANS, (0, 1))
MOVED = LatentLayout(32, 1, SPANS, SPANS, (1, 0))


@pytest.fixture
def adapter(tmp_path):
    def make(module):
        name = f"base_model.model.model.layers.1.{module}.lora_A.weight"
        save_file({name: torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
        return str(tmp_path)

    return make


@pytest.mark.parametrize("module", ["k_proj", "v_proj", "qkv_proj"])
def test_keys_and_values_are_refused(adapter, module):
    with pytest.raises(ValueError, match=f"{module} of layer 1: keys and values are compressed"):
        check_adapter(adapter(f"self_attn.{module}"), {0: NATURAL, 1: NATURAL})


@pytest.mark.parametrize("module", ["q_proj", "o_proj"])
def test_heads_must_be_where_the_adapter_means_them(adapter, module):
    path = adapter(f"self_attn.{module}")
    check_adapter(path, {0: MOVED, 1: NATURAL})
    with pytest.raises(ValueError, match=rf"{module} of layer 1: .* found \[1, 0\]"):
        check_adapter(path, {0: NATURAL, 1: MOVED})


def test_other_modules_are_accepted(adapter):
    check_adapter(adapter("mlp.up_proj"), {0: MOVED, 1: MOVED})
