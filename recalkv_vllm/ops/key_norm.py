"""Key norms by cached scales: what the scales are, and the layer without a norm that they leave."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

import torch

from recalkv_vllm.band_format import CacheFormat
from recalkv_vllm.key_scales import split_pages
from recalkv_vllm.ops.contract import LatentLayer

#: Blocks and offsets in them, ``[tokens]`` each: an index into a paged cache.
Where: TypeAlias = tuple[torch.Tensor, torch.Tensor]


def without_norm(layer: LatentLayer) -> LatentLayer:
    """A layer whose keys, times their cached scales, are those of ``layer``.

    The norm's weight goes into factors and bias: ``w ⊙ (L z + b) = (w ⊙ L) z + w ⊙ b``.
    """
    weight = layer.k_norm_weight
    if weight is None:
        return layer
    up = layer.k_up.unflatten(1, (-1, layer.head_dim))
    groups = len(layer.k_spans)
    # [1, 1, d] or [G_k, s, d]
    rows = weight.float().view(-1, 1 if weight.dim() == 1 else layer.k_group_size, layer.head_dim)
    factors = (up.float() * rows[..., None]).to(up.dtype).view(groups, -1, layer.k_width)
    bias = None if layer.k_bias is None else layer.k_bias.float() * weight.float()
    return replace(layer, k_up=factors, k_bias=bias, k_norm_weight=None)


def key_scales(layer: LatentLayer, z: torch.Tensor, compute_dtype: torch.dtype) -> torch.Tensor:
    """Scales ``[tokens, key_scales]`` of latents ``z: [tokens, rank]`` as the cache gives them.

    Products take ``compute_dtype``; squares and their sums float32, or float64 if that is it.
    """
    wide = torch.promote_types(compute_dtype, torch.float32)
    groups = [
        z[:, span.start : span.end].to(compute_dtype) @ up.to(compute_dtype).T
        for up, span in zip(layer.k_up, layer.k_spans, strict=True)
    ]
    keys = torch.cat(groups, dim=-1).to(wide)
    if layer.k_bias is not None:
        keys += layer.k_bias.to(wide).flatten()
    mean_square = keys.unflatten(-1, (layer.key_scales, -1)).square().mean(dim=-1)
    return torch.rsqrt(mean_square + layer.k_norm_eps)


def update_key_scales(
    layer: LatentLayer,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """Write the scales of a normed layer's keys, of latents that are in the cache already."""
    slots = slot_mapping[slot_mapping >= 0].long()
    latents, scales = split_pages(kv_cache, layer.key_scales)
    assert scales is not None
    block_size = kv_cache.shape[1]
    where = (slots // block_size, slots % block_size)
    z = stored_latents(latents, where, layer.latent_format)
    scales[where] = key_scales(layer, z, compute_dtype).float()


def stored_latents(
    latents: torch.Tensor, where: Where, latent_format: CacheFormat | None
) -> torch.Tensor:
    """Latents ``[tokens, rank]`` out of a paged cache without scales."""
    if latent_format is None:
        return latents[where]
    codes, scales = (part[where] for part in latent_format.split_cache(latents))
    return latent_format.dequantize(latent_format.unpack(codes), scales)
