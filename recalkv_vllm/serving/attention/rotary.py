"""RoPE of the served model: its table for the kernels, and the rotation of queries alone."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.phi3_long_rope_scaled_rope import (
    Phi3LongRoPEScaledRotaryEmbedding,
)


def position_table(rotary: Any) -> tuple[torch.Tensor | None, bool]:
    """``cos_sin_cache: [max_position, rot_dim]`` whose row is a position, and RoPE's pairing.

    None in place of the table for a layer without RoPE.

    LongRoPE keeps a table for short and one for long contexts; vLLM fixes which by the longest
    request that it accepts, so that cached keys never change.
    """
    if rotary is None:
        return None, True
    if isinstance(rotary, Phi3LongRoPEScaledRotaryEmbedding):
        split, tables = rotary.original_max_position_embeddings, rotary.long_short_cos_sin_cache
        assert isinstance(tables, torch.Tensor)
        return (tables[split:] if rotary.use_long_rope else tables[:split]), True
    return rotary.cos_sin_cache, rotary.is_neox_style


def rotate_queries(
    rotary: Any, positions: torch.Tensor, q: torch.Tensor, head_dim: int
) -> torch.Tensor:
    """Rotate ``q: [tokens, h_q · d]``; keys are rotated in attention."""
    # Some insist on keys: the first query head stands in, and its result is dropped.
    insists = isinstance(rotary, Phi3LongRoPEScaledRotaryEmbedding | MRotaryEmbedding)
    # Text has one position in all dimensions.
    flat = positions[0] if positions.ndim == 2 else positions
    return rotary(flat, q, q[:, :head_dim] if insists else None)[0]
