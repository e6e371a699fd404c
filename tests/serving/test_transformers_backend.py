"""RoPE and attention of models that vLLM runs as transformers defines them."""

import pytest
import torch
from torch import nn
from transformers import AutoModel, GlmConfig, LlamaConfig
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as rotate_pairs
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_halves
from vllm.config import VllmConfig, set_current_vllm_config

from recalkv_vllm.checkpoint import CheckpointError
from recalkv_vllm.serving.model.transformers_backend import RotaryTable, transformers_parts

HEAD_DIM, HEADS, WIDTHS = 16, (4, 2, 2), [64, 32, 32]
SIZES = {
    "vocab_size": 8,
    "hidden_size": 64,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "pad_token_id": 0,
}
#: A model, how it rotates, and whether halves of a head are what it pairs.
KINDS = {
    "llama": (LlamaConfig, rotate_halves, True),
    "glm": (GlmConfig, rotate_pairs, False),  # half of a head
}


@pytest.fixture(scope="module", autouse=True)
def vllm_config():
    """For vLLM's RoPE, which asks how to run."""
    with set_current_vllm_config(VllmConfig()):
        yield


def decoder(config_class, **changes):
    return AutoModel.from_config(config_class(**SIZES, **changes))


class Part(nn.Module):
    output_partition_sizes = output_sizes = WIDTHS
    tp_size = 1


class Attention(nn.Module):
    """Attention as transformers writes it and vLLM fuses it."""

    def __init__(self, rotate):
        super().__init__()
        self.qkv_proj, self.attn, self.o_proj = Part(), Part(), Part()
        self.attn.layer_name = "model.layers.0.self_attn.attn"
        self.attn.num_heads = HEADS[0]
        self.rotate = rotate

    def forward(self, hidden_states, position_embeddings, **_):
        parts = self.qkv_proj(hidden_states).split(WIDTHS, dim=-1)
        q, k, v = (
            x.unflatten(-1, (heads, HEAD_DIM)).transpose(1, 2)
            for x, heads in zip(parts, HEADS, strict=True)
        )
        q, k = self.rotate(q, k, *position_embeddings)
        q, k, v = (x.transpose(1, 2).flatten(2)[0] for x in (q, k, v))
        return self.o_proj(self.attn(q, k, v)[None]), None


@pytest.mark.parametrize("kind", KINDS)
def test_table_rotates_as_transformers_does(kind):
    config_class, rotate, is_neox = KINDS[kind]
    table = RotaryTable(decoder(config_class), 64)
    positions = torch.tensor([63, 0, 17])
    x = torch.randn(3, 4, HEAD_DIM)
    expected, _ = rotate(x, x, table.cos[0, positions], table.sin[0, positions], unsqueeze_dim=1)
    torch.testing.assert_close(table.rotated(x, positions, is_neox), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_pairing_is_found(kind):
    config_class, rotate, is_neox = KINDS[kind]
    table = RotaryTable(decoder(config_class), 64)
    parts = transformers_parts(Attention(rotate), HEAD_DIM, table)
    assert parts.rotary_emb.is_neox_style == is_neox
    torch.testing.assert_close(parts.rotary_emb.cos_sin_cache, table.table)
    positions, x = torch.tensor([63, 0, 17]), torch.randn(3, 4 * HEAD_DIM)
    got, _ = parts.rotary_emb.forward_native(positions, x.clone(), None)
    expected = table.rotated(x.unflatten(-1, (4, HEAD_DIM)), positions, is_neox)
    torch.testing.assert_close(got, expected.flatten(-2))


def test_layer_without_rope():
    table = RotaryTable(decoder(LlamaConfig), 64)
    parts = transformers_parts(Attention(lambda q, k, cos, sin: (q, k)), HEAD_DIM, table)
    assert parts.rotary_emb is None


def test_another_rotation_is_refused():
    table = RotaryTable(decoder(LlamaConfig), 64)

    def backwards(q, k, cos, sin):
        return rotate_halves(q, k, cos, -sin)

    with pytest.raises(CheckpointError, match="it changes queries or keys"):
        transformers_parts(Attention(backwards), HEAD_DIM, table)


def test_angles_that_follow_the_longest_sequence_are_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(CheckpointError, match="found dynamic"):
        RotaryTable(decoder(LlamaConfig, rope_parameters=rope), 64)
