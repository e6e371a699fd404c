"""What reaches a model's weights, without an engine around it."""

import pytest
import torch

from recalkv_vllm.checkpoint import AttentionGeometry, CheckpointError, LatentLayout, RecalkvConfig
from recalkv_vllm.serving.model.factor_layers import PerHead
from recalkv_vllm.serving.model.weights import come_from_files, sent_weights

GEOMETRY = AttentionGeometry(num_layers=1, hidden_size=64, num_heads=4, num_kv_heads=4, head_dim=16)
LAYOUT = LatentLayout(
    rank=64,
    k_group_size=2,
    k_spans=((0, 32), (32, 64)),
    v_spans=((0, 64),),
    head_order=(0, 1, 2, 3),
)
CONFIG = RecalkvConfig("svd", 0.5, (LAYOUT,))


def sent(*tensors):
    return dict(sent_weights(tensors, CONFIG, GEOMETRY))


def test_sent_factors_get_their_parameters_names():
    names = sent(
        ("layers.0.down", torch.zeros(64, 64)),
        ("layers.0.k_up", torch.zeros(2, 32, 32)),
        ("model.layers.0.self_attn.q_proj.weight", torch.zeros(64, 64)),
    )
    assert list(names) == [
        "model.layers.0.self_attn.down.weight",
        "model.layers.0.self_attn.k_up.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ]


@pytest.mark.parametrize("projection", ["k_proj.weight", "v_proj.qweight", "qkv_proj.weight"])
def test_sent_projections_are_refused(projection):
    name = f"model.layers.0.self_attn.{projection}"
    with pytest.raises(CheckpointError, match=f"recalkv: {name}: keys and values are served"):
        sent((name, torch.zeros(64, 64)))


def test_a_sent_factor_of_another_shape_is_refused():
    with pytest.raises(CheckpointError, match=r"layers.0.v_up: expected shape \[4, 16, 64\]"):
        sent(("layers.0.v_up", torch.zeros(4, 64, 16)))


def test_a_list_of_tensors_comes_from_no_file():
    assert not come_from_files([("name", torch.zeros(1))])
    assert not come_from_files((name, torch.zeros(1)) for name in ("name",))


def test_a_rank_loads_its_own_heads():
    whole = torch.arange(4 * 16 * 8.0).view(2, 32, 8)
    part = PerHead(range(2, 4), 4, 16, 8)
    part.weight.weight_loader(part.weight, whole)
    assert part.weight.equal(whole[1].view(2, 16, 8))


def test_kernel_format_is_refused():
    with pytest.raises(CheckpointError, match="expected is_checkpoint_format=True"):
        PerHead(range(4), 4, 16).get_parameter("weight")
