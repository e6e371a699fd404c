"""What vLLM has saved rank by rank is checked before it is loaded."""

import pytest
import torch
from safetensors.torch import save_file

from recalkv_vllm.checkpoint import AttentionGeometry, CheckpointError, LatentLayout, RecalkvConfig
from recalkv_vllm.serving.startup.sharded_state import check_sharded_state

GEOMETRY = AttentionGeometry(num_layers=1, hidden_size=64, num_heads=4, num_kv_heads=4, head_dim=16)
SPANS = ((0, 32), (32, 64))
CONFIG = RecalkvConfig("svd", 0.5, (LatentLayout(64, 2, SPANS, SPANS, (0, 1, 2, 3)),))
#: Of the factors on each of one and of two ranks.
SHAPES = {
    1: {"down": (64, 64), "k_up": (4, 16, 32), "v_up": (4, 16, 32)},
    2: {"down": (32, 64), "k_up": (2, 16, 32), "v_up": (2, 16, 32)},
}


@pytest.fixture
def saved(tmp_path):
    """``saved(tp_size)``: a folder with the factors of all ranks, beside other weights."""

    def save(tp_size):
        for rank in range(tp_size):
            shapes = {f"self_attn.{name}": shape for name, shape in SHAPES[tp_size].items()}
            shapes["mlp.up_proj"] = (7, 3)
            tensors = {
                f"model.layers.0.{name}.weight": torch.zeros(shape)
                for name, shape in shapes.items()
            }
            save_file(tensors, tmp_path / f"model-rank-{rank}-part-0.safetensors")
        return tmp_path

    return save


@pytest.mark.parametrize("tp_size", [1, 2])
def test_accepted(saved, tp_size):
    check_sharded_state(saved(tp_size), CONFIG, GEOMETRY, tp_size)


def test_other_ranks(saved):
    message = r"down.weight: expected shape \[32, 64\] on each of 2 ranks, found \[64, 64\]"
    with pytest.raises(CheckpointError, match=message):
        check_sharded_state(saved(1), CONFIG, GEOMETRY, 2)


def test_no_such_layer(saved):
    path = saved(1) / "model-rank-0-part-0.safetensors"
    save_file({"model.layers.1.self_attn.down.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"layers.1.*: expected 1 layers"):
        check_sharded_state(path.parent, CONFIG, GEOMETRY, 1)


def test_truncated(saved):
    path = saved(1) / "model-rank-0-part-0.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        check_sharded_state(path.parent, CONFIG, GEOMETRY, 1)
