"""A layer's constants as the Triton kernels take them; runs once, when weights are loaded."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from recalkv_vllm.band_format import BLOCK_COLUMNS, CODE_ALIGNMENT, BandFormat, CacheFormat
from recalkv_vllm.kernels import heuristics
from recalkv_vllm.kernels.columns import next_power_of_2
from recalkv_vllm.key_scales import split_pages
from recalkv_vllm.latent_format import LatentFormat
from recalkv_vllm.ops.contract import LatentLayer
from recalkv_vllm.ops.key_norm import without_norm
from recalkv_vllm.ops.rotary import pair_order

#: Rows of the tile-local rotation table: no tile is larger.
LARGEST_TILE = 128


def kernel_constants(layer: LatentLayer) -> dict[str, Any]:
    """Arguments of ``latent_attention`` that a layer fixes, by name."""
    key_scales, layer = layer.key_scales, without_norm(layer)
    device = layer.k_up.device
    dim = padded_head_dim(layer)
    columns = pair_order(layer.head_dim, layer.rot_dim, layer.is_neox)
    padded = torch.zeros(dim, dtype=torch.int32)
    padded[: layer.head_dim] = columns
    spans = zip(layer.head_k_spans, layer.head_v_spans, strict=True)
    starts = torch.tensor([(k.start, v.start) for k, v in spans], dtype=torch.int32) // 16
    factors = layer.k_up.reshape(layer.num_kv_heads, layer.head_dim, layer.k_width)
    rope = layer.cos_sin_cache

    def packed(vectors: torch.Tensor | None) -> torch.Tensor | None:
        return None if vectors is None else pack_heads(vectors, columns, dim)

    return {
        "k_up": packed(factors),
        "k_bias": packed(layer.k_bias),
        "first_columns": starts.to(device),
        **format_constants(layer),
        "head_columns": padded.to(device),
        "rope_table": None if rope is None else rope.contiguous(),
        "stride_rope": layer.rot_dim,
        "scale": layer.scale,
        "soft_cap": layer.soft_cap,
        "HEAD_DIM": layer.head_dim,
        "DIM": dim,
        "ROT_HALF": layer.rot_dim // 2,
        "K_WIDTH": layer.k_width,
        "V_WIDTH": layer.v_width,
        "KEY_SCALES": key_scales,
        "WINDOW": layer.sliding_window or 0,
    }


def with_whole_spans(layer: LatentLayer, target: heuristics.Target) -> LatentLayer:
    """The same layer, with keys that read all of their values' spans where that is better.

    Not in bands, which keys and values have cut alike already.
    """
    k_width, v_width = layer.k_width, layer.v_width
    nested = [k.start for k in layer.k_spans] == [v.start for v in layer.v_spans]
    if (
        isinstance(layer.latent_format, BandFormat)
        or not nested
        or not heuristics.prefers_whole_spans(k_width, v_width, target)
    ):
        return layer
    k_up = torch.nn.functional.pad(layer.k_up, (0, v_width - k_width))
    return replace(layer, k_up=k_up, k_spans=layer.v_spans)


def format_constants(layer: LatentLayer) -> dict[str, Any]:
    """Of :func:`kernel_constants`, those that the format of latents fixes."""
    latent_format = layer.latent_format
    constants: dict[str, Any] = {
        "first_codes": None,
        "CODEC": None if latent_format is None else latent_format.dtype,
        "SCALE_SHIFT": 0,
        "CODE_UNIT": 0,
    }
    if isinstance(latent_format, LatentFormat):
        constants["SCALE_SHIFT"] = latent_format.scale_shift
    elif isinstance(latent_format, BandFormat):
        spans = zip(layer.head_k_spans, layer.head_v_spans, strict=True)
        offset = latent_format.code_offset
        offsets = [(offset(k), offset(v)) for k, v in spans]
        unit = math.gcd(CODE_ALIGNMENT, *(each for pair in offsets for each in pair))
        first_codes = torch.tensor(offsets, dtype=torch.int32) // unit
        constants["first_codes"] = first_codes.to(layer.k_up.device)
        constants["SCALE_SHIFT"] = BLOCK_COLUMNS.bit_length() - 1
        constants["CODE_UNIT"] = unit
    return constants


def cache_arguments(
    kv_cache: torch.Tensor, latent_format: CacheFormat | None, key_scales: int
) -> dict[str, Any]:
    """Arguments of a kernel that reads the cache ``[num_blocks, block_size, width]``, by name."""
    latents, of_keys = split_pages(kv_cache, key_scales)
    codes, scales, rank = latents, None, 0
    if latent_format is not None:
        codes, scales = latent_format.split_cache(latents)
        rank = latent_format.rank_of(latents.shape[2])
    return {
        "kv_cache": codes,
        "scales": scales,
        "stride_block": codes.stride(0),
        "stride_slot": codes.stride(1),
        "stride_scale_block": 0 if scales is None else scales.stride(0),
        "stride_scale_slot": 0 if scales is None else scales.stride(1),
        "key_scales": of_keys,
        "stride_key_block": 0 if of_keys is None else of_keys.stride(0),
        "stride_key_slot": 0 if of_keys is None else of_keys.stride(1),
        "BLOCK_SIZE": kv_cache.shape[1],
        "RANK": rank,
    }


def padded_head_dim(layer: LatentLayer) -> int:
    """``d`` as the kernel pads it: a power of two, and as large as matrix products need."""
    return max(16, next_power_of_2(layer.head_dim))


def pack_heads(x: torch.Tensor, columns: torch.Tensor, dim: int) -> torch.Tensor:
    """``[heads, d, *]`` as ``[heads, dim, *]``, in the order of ``columns`` and padded with zeros.

    ``dim`` is ``d`` padded to a power of two; zeros drop out of every product.
    """
    packed = x.new_zeros(x.shape[0], dim, *x.shape[2:])
    packed[:, : columns.shape[0]] = x[:, columns.to(x.device)]
    return packed


def local_rotation(
    cos_sin_cache: torch.Tensor, dim: int, dtype: torch.dtype
) -> torch.Tensor | None:
    """``[LARGEST_TILE, 2, dim / 2]``: cosines and sines of a token's offset in its tile.

    The rotation at position ``p + j`` must be the one at ``p`` times that at offset ``j`` (up to a
    constant magnitude, as YaRN has); this is checked on rows all over the table, to the rounding of
    ``dtype``. Returns None if it does not hold or the table is shorter than a tile.
    """
    positions, rot_dim = cos_sin_cache.shape
    if positions < LARGEST_TILE:
        return None
    table = torch.complex(*cos_sin_cache.float().split(rot_dim // 2, dim=1)).to(torch.complex128)
    offsets = table[:LARGEST_TILE] / table[0].real
    bases = torch.arange(0, positions - LARGEST_TILE + 1, LARGEST_TILE, device=table.device)
    picked = bases[
        torch.linspace(0, len(bases) - 1, 64, dtype=torch.float64, device=table.device).long()
    ]
    rows = picked[:, None] + torch.arange(LARGEST_TILE, device=table.device)
    error = (table[picked][:, None] * offsets - table[rows]).abs().max()
    rounding = torch.finfo(dtype).eps
    if not error <= 2 * rounding * table[0].real.abs().max():
        return None
    packed = torch.zeros(LARGEST_TILE, 2, dim // 2, dtype=torch.float32, device=table.device)
    packed[:, 0] = 1
    packed[:, 0, : rot_dim // 2] = offsets.real
    packed[:, 1, : rot_dim // 2] = offsets.imag
    return packed.to(dtype)
