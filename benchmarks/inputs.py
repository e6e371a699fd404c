"""Random constants of one layer of a geometry: values do not matter, sizes do."""

from __future__ import annotations

import torch

from recalkv_vllm.band_format import CacheFormat, token_bytes
from recalkv_vllm.ops import CheckedLayer, LatentLayer

from .geometries import Geometry, Latent


def latent_layer(
    geometry: Geometry,
    latent: Latent,
    positions: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    latent_format: CacheFormat | None = None,
) -> LatentLayer:
    """Factors, key bias and norm of the geometry, RoPE for ``positions``; all in ``dtype``."""
    groups = len(latent.k_spans)
    rows = geometry.num_kv_heads // groups * geometry.head_dim
    k_up = torch.randn(groups, rows, latent.k_width) / latent.k_width**0.5
    v_up = torch.randn(geometry.num_kv_heads, geometry.head_dim, latent.v_width)
    bias = torch.randn(geometry.num_kv_heads, geometry.head_dim) if geometry.key_bias else None
    norm = torch.ones(geometry.head_dim) if geometry.key_norm else None

    def low(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.to(device, dtype)

    return LatentLayer(
        k_up=k_up.to(device, dtype),
        v_up=v_up.to(device, dtype),
        k_spans=latent.k_spans,
        v_spans=latent.v_spans,
        head_dim=geometry.head_dim,
        scale=geometry.head_dim**-0.5,
        cos_sin_cache=low(_rope(geometry, positions)),
        k_bias=low(bias),
        k_norm_weight=low(norm),
        latent_format=latent_format,
    )


def latent_cache(
    num_blocks: int,
    block_size: int,
    rank: int,
    like: torch.Tensor,
    layer: LatentLayer,
    bound: CheckedLayer,
) -> torch.Tensor:
    """A paged cache of random latents, of ``like``'s dtype if they are not quantized.

    Args:
        bound: writes them.
    """
    z = like.new_empty(num_blocks * block_size, rank).normal_()
    cache = empty_cache(num_blocks, block_size, rank, layer)
    bound.update_cache(z, cache, torch.arange(len(z), device=z.device))
    return cache


def empty_cache(num_blocks: int, block_size: int, rank: int, layer: LatentLayer) -> torch.Tensor:
    """A paged cache for a layer's latents and key scales."""
    dtype = layer.k_up.dtype if layer.latent_format is None else torch.uint8
    width = token_bytes(layer.latent_format, rank, dtype.itemsize, layer.key_scales)
    shape = (num_blocks, block_size, width // dtype.itemsize)
    return torch.empty(shape, dtype=dtype, device=layer.k_up.device)


def _rope(geometry: Geometry, positions: int) -> torch.Tensor:
    """``[positions, d]``, cosines then sines: vLLM's table, computed as vLLM does."""
    exponent = torch.arange(0, geometry.head_dim, 2, dtype=torch.float64) / geometry.head_dim
    angle = torch.arange(positions)[:, None] * geometry.rope_theta**-exponent
    return torch.cat((angle.cos(), angle.sin()), dim=-1)
