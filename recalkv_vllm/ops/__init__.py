"""The ops on paged latents: one contract, several implementations, picked by ``dispatch``.

Contracts (shapes, units, results) are those of :mod:`recalkv_vllm.ops.reference`. Arguments are
checked before any kernel starts: ``TypeError`` for a dtype, ``ValueError`` for everything else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from recalkv_vllm.ops import validation
from recalkv_vllm.ops.dispatch import BoundAttention, KernelUnavailableError, implementation

__all__ = [
    "BoundAttention",
    "KernelUnavailableError",
    "bind_paged_latent_attention",
    "latent_cache_update",
    "latent_value_up",
    "paged_latent_attention",
]

Span = tuple[int, int]


def latent_cache_update(
    z: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Write latents into their slots; see :func:`reference.latent_cache_update`."""
    validation.check_cache_update(z, kv_cache, slot_mapping)
    implementation(kv_cache.device, kv_cache.dtype).latent_cache_update(z, kv_cache, slot_mapping)


def bind_paged_latent_attention(
    k_up: torch.Tensor,
    k_spans: Sequence[Span],
    v_spans: Sequence[Span],
    *,
    head_dim: int,
    scale: float,
    cos_sin_cache: torch.Tensor | None = None,
    is_neox: bool = True,
    k_bias: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    k_norm_eps: float = 1e-6,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> BoundAttention:
    """Check and pack what is fixed once weights are loaded.

    Arguments as in :func:`reference.paged_latent_attention`; ``head_dim`` is ``d``. Later changes
    of the tensors given here are not seen.

    Returns:
        A function of ``(q, kv_cache, block_table, seq_lens, query_start_loc)``.
    """
    constants = {
        "head_dim": head_dim,
        "scale": scale,
        "cos_sin_cache": cos_sin_cache,
        "is_neox": is_neox,
        "k_bias": k_bias,
        "k_norm_weight": k_norm_weight,
        "k_norm_eps": k_norm_eps,
        "sliding_window": sliding_window,
        "soft_cap": soft_cap,
    }
    signature = validation.AttentionSignature.of(k_up, k_spans, v_spans, **constants)
    chosen = implementation(k_up.device, k_up.dtype, head_dim)
    attend = chosen.bind_paged_latent_attention(k_up, k_spans, v_spans, **constants)

    def checked(
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        signature.check_call(q, kv_cache, block_table, seq_lens, query_start_loc)
        return attend(q, kv_cache, block_table, seq_lens, query_start_loc)

    return checked


def paged_latent_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    k_up: torch.Tensor,
    k_spans: Sequence[Span],
    v_spans: Sequence[Span],
    *,
    scale: float,
    cos_sin_cache: torch.Tensor | None = None,
    is_neox: bool = True,
    k_bias: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    k_norm_eps: float = 1e-6,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bind and call at once, for tests and experiments; packing factors costs more than a call.

    See :func:`reference.paged_latent_attention`.
    """
    attend = bind_paged_latent_attention(
        k_up,
        k_spans,
        v_spans,
        head_dim=q.shape[-1],
        scale=scale,
        cos_sin_cache=cos_sin_cache,
        is_neox=is_neox,
        k_bias=k_bias,
        k_norm_weight=k_norm_weight,
        k_norm_eps=k_norm_eps,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )
    return attend(q, kv_cache, block_table, seq_lens, query_start_loc)


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
