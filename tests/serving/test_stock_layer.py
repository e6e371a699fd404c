"""What vLLM's attention layers can be asked for, and latents are not served with."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention
from vllm.v1.attention.backend import AttentionType

from recalkv_vllm.checkpoint import CheckpointError
from recalkv_vllm.serving.model.stock_layer import check_stock_layer

SCALE = 0.2


def make(kind=Attention, attn_type=AttentionType.DECODER, shared=None, **implementation):
    """A layer of vLLM's, as far as it is looked at; its own constructor wants a whole engine."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer.layer_name, layer.attn_type, layer.kv_sharing_target_layer_name = "it", attn_type, shared
    layer.impl = SimpleNamespace(**implementation)
    return layer


@pytest.mark.parametrize(
    ("implementation", "soft_cap"),
    [
        ({}, None),
        ({"logits_soft_cap": 0, "alibi_slopes": None, "sinks": None}, None),
        ({"logits_soft_cap": None}, None),
        ({"logits_soft_cap": 3.0, "scale": SCALE}, 3.0),
    ],
)
def test_served(implementation, soft_cap):
    check_stock_layer(make(**implementation), SCALE, soft_cap, None)


def test_sinks_that_are_served():
    sinks = nn.Parameter(torch.zeros(4))
    check_stock_layer(make(sinks=sinks), SCALE, None, sinks)


@pytest.mark.parametrize(
    ("arguments", "soft_cap", "message"),
    [
        ({"alibi_slopes": [0.5]}, None, "ALiBi"),
        ({"sinks": [0.5]}, None, "other attention sinks"),
        ({"scale": 0.3}, None, "another scale"),
        ({"logits_soft_cap": 3.0}, None, "another soft cap"),
        ({"logits_soft_cap": 0}, 3.0, "another soft cap"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, None, "attention that is not a decoder's"),
        ({"shared": "layers.0"}, None, "another layer's cache"),
        ({"kind": ChunkedLocalAttention}, None, "a ChunkedLocalAttention"),
    ],
)
def test_refused(arguments, soft_cap, message):
    with pytest.raises(CheckpointError, match=f"it: found {message}, which latents are not"):
        check_stock_layer(make(**arguments), SCALE, soft_cap, None)
