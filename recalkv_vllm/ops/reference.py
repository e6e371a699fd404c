"""Torch reference of every op: the contract in code, obviously right, no tricks.

Every op computes in ``compute_dtype``: float64 makes an oracle, float32 the usual reference, and a
low precision the "plain torch" that fast versions are measured against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from recalkv_vllm.latent_format import LatentFormat
from recalkv_vllm.ops.dispatch import BoundAttention
from recalkv_vllm.ops.layer import NO_HINTS, BatchHints, LatentLayer

Span = tuple[int, int]


def latent_cache_update(
    z: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    latent_format: LatentFormat | None = None,
) -> None:
    """Write latents into their slots of the paged cache.

    Args:
        z: ``[tokens, rank]`` latents.
        kv_cache: ``[num_blocks, block_size, rank]``, any strides; written in place. With a
            ``latent_format``, uint8 ``[num_blocks, block_size, slot_bytes]``, each block contiguous
            and laid out as :mod:`recalkv_vllm.latent_format` says.
        slot_mapping: ``[tokens]`` integers, ``block · block_size + offset``; negative is padding.
        latent_format: codes and scales to store instead of the numbers.
    """
    real = slot_mapping >= 0
    slots = slot_mapping[real].long()
    latents = z[: real.shape[0]][real]
    block_size = kv_cache.shape[1]
    where = (slots // block_size, slots % block_size)
    if latent_format is None:
        kv_cache[where] = latents.to(kv_cache.dtype)
        return
    all_codes, all_scales = latent_format.split_cache(kv_cache)
    codes, all_scales[where] = latent_format.quantize(latents)
    all_codes[where] = latent_format.pack(codes)


def cached_latents(
    kv_cache: torch.Tensor,
    blocks: torch.Tensor,
    length: int,
    latent_format: LatentFormat | None,
) -> torch.Tensor:
    """Latents ``[length, rank]`` of one sequence, ``blocks: [max_blocks]`` its row of the table."""
    positions = torch.arange(length, device=kv_cache.device)
    block_size = kv_cache.shape[1]
    where = blocks.long()[positions // block_size], positions % block_size
    if latent_format is None:
        return kv_cache[where]
    codes, scales = (part[where] for part in latent_format.split_cache(kv_cache))
    return latent_format.dequantize(latent_format.unpack(codes), scales)


def apply_rope(
    x: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor, is_neox: bool
) -> torch.Tensor:
    """Rotate the first ``rot_dim`` columns of ``x: [tokens, heads, d]``.

    Args:
        x: vectors to rotate.
        positions: ``[tokens]`` row of ``cos_sin_cache`` for each token.
        cos_sin_cache: ``[max_position, rot_dim]``, cosines then sines (vLLM's layout).
        is_neox: pairs are ``(i, i + rot_dim/2)`` if true, ``(2i, 2i + 1)`` if not.
    """
    half = cos_sin_cache.shape[1] // 2
    cos, sin = cos_sin_cache[positions].to(x.dtype).unsqueeze(1).chunk(2, dim=-1)
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    if is_neox:
        a, b = rotated[..., :half], rotated[..., half:]
    else:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
    first, second = a * cos - b * sin, b * cos + a * sin
    if is_neox:
        turned = torch.cat((first, second), dim=-1)
    else:
        turned = torch.stack((first, second), dim=-1).flatten(-2)
    return torch.cat((turned, rest), dim=-1)


def reconstruct_keys(
    z: torch.Tensor,
    positions: torch.Tensor,
    k_up: torch.Tensor,
    k_spans: Sequence[Span],
    head_dim: int,
    *,
    cos_sin_cache: torch.Tensor | None,
    is_neox: bool,
    k_bias: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    k_norm_eps: float,
) -> torch.Tensor:
    """``k = RoPE(norm(L_k z_k + b_k), position)`` for every head.

    Args:
        z: ``[tokens, rank]`` latents, in the precision to compute in.

    Returns:
        Keys ``[tokens, h_kv, head_dim]``.
    """
    groups = [
        z[:, start:end] @ up.to(z.dtype).T for up, (start, end) in zip(k_up, k_spans, strict=True)
    ]
    keys = torch.cat(groups, dim=-1).unflatten(-1, (-1, head_dim))
    if k_bias is not None:
        keys = keys + k_bias.to(z.dtype)
    if k_norm_weight is not None:
        mean_square = keys.square().mean(dim=-1, keepdim=True)
        keys = keys * torch.rsqrt(mean_square + k_norm_eps) * k_norm_weight.to(z.dtype)
    if cos_sin_cache is not None:
        keys = apply_rope(keys, positions, cos_sin_cache, is_neox)
    return keys


def causal_logits(
    q: torch.Tensor,
    keys: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    """Logits of one sequence's newest queries, minus infinity where a query sees no key.

    Args:
        q: ``[queries, h_q, d]``, the last tokens of the sequence.
        keys: ``[tokens, h_kv, d]``.

    Returns:
        ``[h_q, queries, tokens]``.
    """
    num_queries, length = q.shape[0], keys.shape[0]
    keys = keys.repeat_interleave(q.shape[1] // keys.shape[1], dim=1)
    logits = torch.einsum("qhd,nhd->hqn", q, keys) * scale
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    positions = torch.arange(length, device=q.device)
    distance = positions[length - num_queries :, None] - positions[None, :]
    hidden = distance < 0
    if sliding_window is not None:
        hidden |= distance >= sliding_window
    return logits.masked_fill(hidden, -torch.inf)


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
    latent_format: LatentFormat | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of rotated queries over a paged cache of latents.

    Args:
        q: ``[tokens, h_q, d]``, already normed and rotated. Sequence ``i`` owns the rows
            ``query_start_loc[i]:query_start_loc[i + 1]``, its newest tokens.
        kv_cache: ``[num_blocks, block_size, rank]``, any strides; with a ``latent_format`` as
            :func:`latent_cache_update` writes it.
        block_table: ``[num_seqs, max_blocks]`` int32.
        seq_lens: ``[num_seqs]`` int32, cached tokens including this call's; 0 is padding.
        query_start_loc: ``[num_seqs + 1]`` int32.
        k_up: ``[G_k, s·d, width]`` up factors of the K groups; ``h_kv = G_k · s``.
        k_spans: ``[start, end)`` in the latent, one per K group.
        v_spans: the same, one per V group; KV head ``h`` is in V group ``h // (h_kv / G_v)``.
        scale: factor on ``q·k``.
        cos_sin_cache: ``[max_position, rot_dim]``; row = position of the token in its sequence.
        is_neox: RoPE pairing, see :func:`apply_rope`.
        k_bias: ``[h_kv, d]`` added to keys before norm and RoPE.
        k_norm_weight: ``[d]`` of a per-head RMS norm of keys before RoPE.
        k_norm_eps: its epsilon.
        sliding_window: a query sees this many newest keys, itself included.
        soft_cap: logits become ``cap · tanh(logit / cap)``.
        latent_format: how latents are quantised in the cache.
        compute_dtype: precision of all arithmetic.

    Returns:
        ``o_lat: [tokens, h_q, v_width]``, per-head value latents, and ``lse: [tokens, h_q]``, the
        natural log-sum-exp of the logits, both float32 (float64 if computed so). Rows past
        ``query_start_loc[-1]`` are unspecified (here: zero, and minus infinity).
    """
    tokens, num_heads, head_dim = q.shape
    v_width = v_spans[0][1] - v_spans[0][0]
    out_dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
    o_lat = torch.zeros(tokens, num_heads, v_width, dtype=out_dtype, device=q.device)
    lse = torch.full((tokens, num_heads), -torch.inf, dtype=out_dtype, device=q.device)
    starts = query_start_loc.tolist()

    for seq, length in enumerate(seq_lens.tolist()):
        rows = slice(starts[seq], starts[seq + 1])
        num_queries = rows.stop - rows.start
        if num_queries == 0 or length == 0:
            continue
        z = cached_latents(kv_cache, block_table[seq], length, latent_format).to(compute_dtype)
        keys = reconstruct_keys(
            z,
            torch.arange(length, device=q.device),
            k_up,
            k_spans,
            head_dim,
            cos_sin_cache=cos_sin_cache,
            is_neox=is_neox,
            k_bias=k_bias,
            k_norm_weight=k_norm_weight,
            k_norm_eps=k_norm_eps,
        )
        values = torch.stack([z[:, start:end] for start, end in v_spans], dim=1)
        values = values.repeat_interleave(num_heads // len(v_spans), dim=1)
        logits = causal_logits(
            q[rows].to(compute_dtype),
            keys,
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
        )
        o_lat[rows] = torch.einsum("hqn,nhr->qhr", logits.softmax(dim=-1), values).to(out_dtype)
        lse[rows] = logits.logsumexp(dim=-1).T.to(out_dtype)
    return o_lat, lse


def latent_value_up(
    o_lat: torch.Tensor,
    v_up: torch.Tensor,
    v_bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``o[h] = L_v[h] o_lat[h] + b_v[h]``: from value latents to head outputs.

    Args:
        o_lat: ``[tokens, h_q, v_width]``.
        v_up: ``[h_kv, d, v_width]``.
        v_bias: ``[h_kv, d]``; added once, since probabilities sum to one.
        out_dtype: dtype of the result; that of ``v_up`` if not given.

    Returns:
        ``[tokens, h_q, d]``.
    """
    per_kv = o_lat.shape[1] // v_up.shape[0]
    up = v_up.to(compute_dtype).repeat_interleave(per_kv, dim=0)
    out = torch.einsum("qhr,hdr->qhd", o_lat.to(compute_dtype), up)
    if v_bias is not None:
        out = out + v_bias.to(compute_dtype).repeat_interleave(per_kv, dim=0)
    return out.to(out_dtype or v_up.dtype)


def unsupported_reason(
    device: torch.device, dtype: torch.dtype, head_dim: int | None
) -> str | None:
    """The reference runs everywhere."""
    return None


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """What runs, for the log."""
    return "plain torch in float32, slow"


@dataclass(frozen=True, slots=True)
class ReferenceAttention(BoundAttention):
    """:func:`paged_latent_attention` with its constants given; packs nothing."""

    layer: LatentLayer

    def __call__(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        hints: BatchHints = NO_HINTS,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        constants = {f.name: getattr(self.layer, f.name) for f in fields(self.layer)}
        del constants["head_dim"]  # that of q
        return paged_latent_attention(
            q, kv_cache, block_table, seq_lens, query_start_loc, **constants
        )


bind_paged_latent_attention = ReferenceAttention
