"""Torch reference of every op: the contract in code, obviously right, no tricks.

Every op computes in ``compute_dtype``: float64 makes an oracle, float32 the usual reference, and a
low precision the "plain torch" that fast versions are measured against.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recalkv_vllm.band_format import CacheFormat
from recalkv_vllm.key_scales import split_pages
from recalkv_vllm.ops.contract import Batch, BatchLimits, BoundLayer, LatentLayer, Pieces
from recalkv_vllm.ops.key_norm import stored_latents, update_key_scales
from recalkv_vllm.ops.sinks import shares_beside_sinks


def latent_cache_update(
    z: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    latent_format: CacheFormat | None = None,
) -> None:
    """Latents, and no scales, into a cache without scales; see :meth:`BoundLayer.update_cache`."""
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


def cached_tokens(
    layer: LatentLayer, kv_cache: torch.Tensor, blocks: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Latents ``[length, rank]`` and scales ``[length, key_scales]`` of one sequence.

    ``blocks: [max_blocks]`` is its row of the table; scales are None without a key norm.
    """
    latents, scales = split_pages(kv_cache, layer.key_scales)
    positions = torch.arange(length, device=kv_cache.device)
    block_size = kv_cache.shape[1]
    where = blocks.long()[positions // block_size], positions % block_size
    z = stored_latents(latents, where, layer.latent_format)
    return z, None if scales is None else scales[where]


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
    layer: LatentLayer,
    z: torch.Tensor,
    positions: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """``k = RoPE(norm(L_k z_k + b_k), position)`` for every head.

    Args:
        z: ``[tokens, rank]`` latents, in the precision to compute in.
        positions: ``[tokens]``.
        scales: ``[tokens, key_scales]`` of a normed layer.

    Returns:
        Keys ``[tokens, h_kv, d]``.
    """
    groups = [
        z[:, span.start : span.end] @ up.to(z.dtype).T
        for up, span in zip(layer.k_up, layer.k_spans, strict=True)
    ]
    keys = torch.cat(groups, dim=-1).unflatten(-1, (-1, layer.head_dim))
    if layer.k_bias is not None:
        keys = keys + layer.k_bias.to(z.dtype)
    if layer.k_norm_weight is not None:
        assert scales is not None
        keys = keys * scales.to(z.dtype)[..., None] * layer.k_norm_weight.to(z.dtype)
    if layer.cos_sin_cache is not None:
        keys = apply_rope(keys, positions, layer.cos_sin_cache, layer.is_neox)
    return keys


def reconstruct_values(layer: LatentLayer, z: torch.Tensor) -> torch.Tensor:
    """``v = L_v z_v + b_v`` for every head: ``[tokens, h_kv, d]`` of latents ``[tokens, rank]``."""
    spans = torch.stack([z[:, span.start : span.end] for span in layer.head_v_spans], dim=1)
    return latent_value_up(
        spans, layer.v_up, layer.v_bias, out_dtype=z.dtype, compute_dtype=z.dtype
    )


def reconstruct(
    layer: LatentLayer,
    kv_cache: torch.Tensor,
    pieces: Pieces,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """See :meth:`BoundLayer.reconstruct`."""
    starts = pieces.start_loc.tolist()
    for seq, first in enumerate(pieces.positions.tolist()):
        rows = slice(starts[seq], starts[seq + 1])
        end = first + rows.stop - rows.start
        z, scales = cached_tokens(layer, kv_cache, pieces.block_table[seq], end)
        z, scales = z[first:].to(compute_dtype), None if scales is None else scales[first:]
        positions = torch.arange(first, end, device=z.device)
        keys[rows] = reconstruct_keys(layer, z, positions, scales).to(keys.dtype)
        values[rows] = reconstruct_values(layer, z).to(values.dtype)


def causal_logits(layer: LatentLayer, q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Logits of one sequence's newest queries, minus infinity where a query sees no key.

    Args:
        q: ``[queries, h_q, d]``, the last tokens of the sequence.
        keys: ``[tokens, h_kv, d]``.

    Returns:
        ``[h_q, queries, tokens]``.
    """
    num_queries, length = q.shape[0], keys.shape[0]
    keys = keys.repeat_interleave(q.shape[1] // keys.shape[1], dim=1)
    logits = torch.einsum("qhd,nhd->hqn", q, keys) * layer.scale
    if layer.soft_cap is not None:
        logits = layer.soft_cap * torch.tanh(logits / layer.soft_cap)
    positions = torch.arange(length, device=q.device)
    distance = positions[length - num_queries :, None] - positions[None, :]
    hidden = distance < 0
    if layer.sliding_window is not None:
        hidden |= distance >= layer.sliding_window
    return logits.masked_fill(hidden, -torch.inf)


def paged_latent_attention(
    layer: LatentLayer,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: Batch,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :meth:`BoundLayer.attend`; results are float64 if computed so.

    Rows past ``query_start_loc[-1]`` are zero, and minus infinity.
    """
    tokens, num_heads, _ = q.shape
    out_dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
    o_lat = torch.zeros(tokens, num_heads, layer.v_width, dtype=out_dtype, device=q.device)
    lse = torch.full((tokens, num_heads), -torch.inf, dtype=out_dtype, device=q.device)
    starts = batch.query_start_loc.tolist()

    for seq, length in enumerate(batch.seq_lens.tolist()):
        rows = slice(starts[seq], starts[seq + 1])
        if rows.start == rows.stop or length == 0:
            continue
        z, scales = cached_tokens(layer, kv_cache, batch.block_table[seq], length)
        z = z.to(compute_dtype)
        keys = reconstruct_keys(layer, z, torch.arange(length, device=q.device), scales)
        values = torch.stack([z[:, span.start : span.end] for span in layer.v_spans], dim=1)
        values = values.repeat_interleave(num_heads // len(layer.v_spans), dim=1)
        logits = causal_logits(layer, q[rows].to(compute_dtype), keys)
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


def paged_latent_heads(
    layer: LatentLayer,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: Batch,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """See :meth:`BoundLayer.attend_heads`; the result has the dtype of value latents."""
    o_lat, lse = paged_latent_attention(layer, q, kv_cache, batch, compute_dtype=compute_dtype)
    heads = latent_value_up(
        o_lat, layer.v_up, layer.v_bias, out_dtype=o_lat.dtype, compute_dtype=compute_dtype
    )
    if layer.sinks is not None:
        heads = heads * shares_beside_sinks(lse, layer.sinks)[..., None]
    return heads


def unsupported_reason(
    device: torch.device, dtype: torch.dtype, head_dim: int | None
) -> str | None:
    """The reference runs everywhere."""
    return None


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """What runs, for the log."""
    return "plain torch in float32, slow"


@dataclass(frozen=True, slots=True)
class ReferenceLayer(BoundLayer):
    """The functions above with their layer given; packs nothing."""

    layer: LatentLayer

    def update_cache(
        self, z: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        latents, scales = split_pages(kv_cache, self.layer.key_scales)
        latent_cache_update(z, latents, slot_mapping, self.layer.latent_format)
        if scales is not None:
            update_key_scales(self.layer, kv_cache, slot_mapping)

    def attend(
        self, q: torch.Tensor, kv_cache: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return paged_latent_attention(self.layer, q, kv_cache, batch)

    def attend_heads(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: Batch,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        heads = paged_latent_heads(self.layer, q, kv_cache, batch).to(q.dtype)
        return heads if out is None else out.copy_(heads)

    def value_up(self, o_lat: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        return latent_value_up(o_lat, self.layer.v_up, self.layer.v_bias, out_dtype=out_dtype)

    def reconstruct(
        self, kv_cache: torch.Tensor, pieces: Pieces, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        reconstruct(self.layer, kv_cache, pieces, keys, values)

    def reserve(self, limits: BatchLimits) -> None:
        """Nothing to reserve."""


def bind(layer: LatentLayer) -> ReferenceLayer:
    """Serve a layer in plain torch."""
    return ReferenceLayer(layer)
