"""A layer's constants as the C++ attention takes them: one object, checked when it is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

import torch

from recalkv_vllm.band_format import BandFormat, CacheFormat
from recalkv_vllm.ops.contract import LatentLayer
from recalkv_vllm.ops.cpu import tables
from recalkv_vllm.ops.key_norm import without_norm
from recalkv_vllm.ops.rotary import pair_order

Tensor: TypeAlias = torch.Tensor


class AttentionLayer(Protocol):
    """A layer packed for one instruction set (``csrc/cpu/attention_layer.h``), and its ops.

    They take queries, cache, block table, sequence lengths and query starts.

    Args:
        attend: ``recalkv_cpu::paged_latent_attention``.
        attend_heads: ``recalkv_cpu::paged_latent_attention_heads``, whose last argument it writes.
    """

    attend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    attend_heads: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]


class PackedFormat(NamedTuple):
    """How latents are stored, as arguments of the C++ ops.

    Args:
        latent_dtype: empty for latents as they are.
        bands: ``[bands, 2]`` columns and bits; a tensor, since an op's lists take long to read.
    """

    latent_dtype: str
    group_size: int
    bands: torch.Tensor | None


def pack_format(latent_format: CacheFormat | None) -> PackedFormat:
    """A format as the C++ ops take it; None stores latents as they are."""
    if latent_format is None:
        return PackedFormat("", 0, None)
    bands = None
    if isinstance(latent_format, BandFormat):
        bands = torch.tensor(latent_format.bands, dtype=torch.int64, device="cpu")
    return PackedFormat(latent_format.dtype, latent_format.group_size, bands)


def factors_dtype(isa: str) -> torch.dtype:
    """In which an instruction set multiplies."""
    return torch.bfloat16 if torch.ops.recalkv_cpu.bf16_products(isa) else torch.float32


def per_unit(dtype: torch.dtype) -> int:
    """Elements of factors that share a unit of 32 bits."""
    return 4 // dtype.itemsize


def pack_layer(layer: LatentLayer, isa: str) -> AttentionLayer:
    """Pack a layer's constants for one instruction set.

    Columns of a head are in pair order.
    """
    key_scales, layer = layer.key_scales, without_norm(layer)
    dtype = factors_dtype(isa)
    classes = torch.classes.recalkv_cpu
    order = pair_order(layer.head_dim, layer.rot_dim, layer.is_neox)
    k_factors = layer.k_up.reshape(-1, layer.head_dim, layer.k_width)[:, order]
    k_factors = k_factors.to(dtype).contiguous()
    rope, bias = layer.cos_sin_cache, layer.k_bias
    rotation, expansions = None, []
    if rope is not None:
        rotation = classes.Rotation(
            tiles=tables.rope_tiles(rope), max_position=rope.shape[0], is_neox=layer.is_neox
        )
        if layer.k_up.dtype == torch.bfloat16:
            expansions = tables.expansions(rope, layer.head_dim)
    pair_factors = None
    if expansions:
        members = k_factors.unflatten(1, (-1, per_unit(dtype)))
        pair_factors = members.transpose(2, 3).contiguous()
    panel = None
    if layer.v_width > layer.head_dim:
        pairs = layer.v_up.unflatten(2, (-1, per_unit(dtype)))
        panel = pairs.transpose(1, 2).to(k_factors.dtype).contiguous()
    return classes.AttentionLayer(
        isa=isa,
        keys=classes.Keys(
            factors=k_factors,
            bias=None if bias is None else bias[:, order].float().contiguous(),
            scales=key_scales,
            pair_factors=pair_factors,
        ),
        spans=classes.Spans(
            k_starts=[span.start for span in layer.k_spans],
            v_starts=[span.start for span in layer.v_spans],
            v_width=layer.v_width,
        ),
        values=classes.Values(
            factors=layer.v_up.contiguous(),
            bias=None if layer.v_bias is None else layer.v_bias.float().contiguous(),
            panel=panel,
        ),
        rotation=rotation,
        expansions=[_packed(expansion) for expansion in expansions],
        logits=classes.Logits(
            scale=layer.scale,
            soft_cap=layer.soft_cap or 0.0,
            window=layer.sliding_window or 0,
            sinks=None if layer.sinks is None else layer.sinks.float().contiguous(),
        ),
        **pack_format(layer.latent_format)._asdict(),
    )


def _packed(expansion: tables.Expansion) -> torch.ScriptObject:
    return torch.classes.recalkv_cpu.PairExpansion(
        tile_pairs=expansion.tile_pairs,
        stretch_pairs=expansion.stretch_pairs,
        basis=expansion.basis,
        tile_coefficients=expansion.tile_coefficients,
        stretch_coefficients=expansion.stretch_coefficients,
        stretch_basis=expansion.stretch_basis,
    )
