"""Where the attention projections of a loaded model are.

All supported families share the module names of Llama (``model.layers[i].self_attn.k_proj``) and
feed the key and value projections the same input; only Phi-3 fuses them with the queries'.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

#: A transformers model; what is inside has no static types there.
CausalLM = Any


class Attention(Protocol):
    """A decoder layer's attention module, as far as it is touched here."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    head_dim: int
    qkv_proj: nn.Module  # only where the three are fused


def indexed_attention(model: CausalLM) -> dict[int, Attention]:
    """The attention module of every decoder layer that has one, by the layer's index."""
    found = enumerate(getattr(layer, "self_attn", None) for layer in model.model.layers)
    return {index: attention for index, attention in found if attention is not None}


def attention_modules(model: CausalLM) -> list[Attention]:
    """The attention module of every decoder layer that has one, first layer first."""
    return list(indexed_attention(model).values())


class SplitProjection(nn.Module):
    """A fused ``qkv_proj`` (Phi-3) as three projections that can be watched, and exchanged."""

    def __init__(self, attention: Attention):
        super().__init__()
        self._of = (attention,)  # in a tuple: as a module it would be its own descendant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (attention,) = self._of
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        return torch.cat([part(x) for part in parts], dim=-1)


def split_fused_projections(model: CausalLM) -> None:
    """Give attention modules with a fused ``qkv_proj`` the projections that others have."""
    config = model.config
    for attention in attention_modules(model):
        fused = getattr(attention, "qkv_proj", None)
        if fused is None:
            continue
        kv_rows = config.num_key_value_heads * attention.head_dim
        rows = (config.num_attention_heads * attention.head_dim, kv_rows, kv_rows)
        for name, weight in zip(("q", "k", "v"), fused.weight.data.split(rows), strict=True):
            out_features, in_features = weight.shape
            part = nn.Linear(in_features, out_features, bias=False, device="meta")
            part.weight = nn.Parameter(weight)
            setattr(attention, f"{name}_proj", part)
        attention.qkv_proj = SplitProjection(attention)
