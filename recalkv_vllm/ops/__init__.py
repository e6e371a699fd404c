"""The ops on paged latents: one contract, several implementations, picked by ``dispatch``.

Contracts (shapes, units, results) are those of :mod:`recalkv_vllm.ops.reference`. Arguments are
checked before any kernel starts: ``TypeError`` for a dtype, ``ValueError`` for everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from recalkv_vllm.latent_format import LatentFormat
from recalkv_vllm.ops import validation
from recalkv_vllm.ops.dispatch import BoundAttention, KernelUnavailableError, implementation
from recalkv_vllm.ops.layer import NO_HINTS, BatchHints, LatentLayer

__all__ = [
    "BatchHints",
    "BoundAttention",
    "KernelUnavailableError",
    "LatentLayer",
    "bind_paged_latent_attention",
    "latent_cache_update",
    "latent_value_up",
    "paged_latent_attention",
]

Span = tuple[int, int]


def latent_cache_update(
    z: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    latent_format: LatentFormat | None = None,
) -> None:
    """Write latents into their slots; see :func:`reference.latent_cache_update`."""
    validation.check_cache_update(z, kv_cache, slot_mapping, latent_format)
    chosen = implementation(kv_cache.device, z.dtype)
    chosen.latent_cache_update(z, kv_cache, slot_mapping, latent_format)


class CheckedAttention(BoundAttention):
    """A layer's attention by the implementation chosen for it; every call's arguments checked."""

    def __init__(self, layer: LatentLayer):
        self._signature = validation.AttentionSignature.of(layer)
        chosen = implementation(layer.k_up.device, layer.k_up.dtype, layer.head_dim)
        self._attend = chosen.bind_paged_latent_attention(layer)

    def __call__(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        hints: BatchHints = NO_HINTS,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend; see :func:`reference.paged_latent_attention`."""
        self._signature.check_call(q, kv_cache, block_table, seq_lens, query_start_loc)
        return self._attend(q, kv_cache, block_table, seq_lens, query_start_loc, hints)

    def reserve(
        self, num_heads: int, max_num_seqs: int, max_decode_query_len: int, max_seq_len: int
    ) -> None:
        self._attend.reserve(num_heads, max_num_seqs, max_decode_query_len, max_seq_len)


#: Check and pack what is fixed once weights are loaded.
bind_paged_latent_attention = CheckedAttention


def paged_latent_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    k_up: torch.Tensor,
    k_spans: Sequence[Span],
    v_spans: Sequence[Span],
    **constants: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bind and call at once, for tests and experiments; packing factors costs more than a call.

    See :func:`reference.paged_latent_attention`; ``constants`` are its keywords.
    """
    layer = LatentLayer(
        k_up=k_up, k_spans=k_spans, v_spans=v_spans, head_dim=q.shape[-1], **constants
    )
    return CheckedAttention(layer)(q, kv_cache, block_table, seq_lens, query_start_loc)


def latent_value_up(
    o_lat: torch.Tensor,
    v_up: torch.Tensor,
    v_bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """From value latents to head outputs; see :func:`reference.latent_value_up`."""
    validation.check_value_up(o_lat, v_up, v_bias, out_dtype)
    chosen = implementation(v_up.device, v_up.dtype)
    return chosen.latent_value_up(o_lat, v_up, v_bias, out_dtype=out_dtype)
