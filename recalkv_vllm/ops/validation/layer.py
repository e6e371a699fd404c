"""What a layer's constants must be, checked once when it is bound."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch

from recalkv_vllm.band_format import BandFormat, CacheFormat
from recalkv_vllm.ops.contract import LatentLayer
from recalkv_vllm.ops.validation.require import (
    DTYPES,
    require,
    require_device,
    require_dtype,
    require_shape,
    require_spans,
)


@dataclass(frozen=True, slots=True)
class LayerSignature:
    """What a bound layer fixes about the arguments of its calls.

    Args:
        num_heads: query heads; None if nothing fixes them.
        rank: columns of the latent that spans need.
        key_scales: of a cached token.
        max_position: rows of ``cos_sin_cache``.
        check_values: ``RECALKV_DEBUG=1`` asked for checks of values when the layer was bound.
    """

    num_heads: int | None
    num_kv_heads: int
    head_dim: int
    rank: int
    v_width: int
    dtype: torch.dtype
    device: torch.device
    max_position: int | None
    latent_format: CacheFormat | None
    key_scales: int
    check_values: bool


def check_layer(layer: LatentLayer) -> LayerSignature:
    """Check a layer's constants.

    Raises:
        TypeError: a tensor's dtype.
        ValueError: anything else; the message names argument, expected and found.
    """
    _check_factors(layer)
    _check_optional_tensors(layer)
    _check_numbers(layer)
    if isinstance(layer.latent_format, BandFormat):
        _check_bands(layer, layer.latent_format)
    return LayerSignature(
        num_heads=None if layer.sinks is None else layer.sinks.shape[0],
        num_kv_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
        rank=max(span.end for span in (*layer.k_spans, *layer.v_spans)),
        v_width=layer.v_width,
        dtype=layer.k_up.dtype,
        device=layer.k_up.device,
        max_position=None if layer.cos_sin_cache is None else layer.cos_sin_cache.shape[0],
        latent_format=layer.latent_format,
        key_scales=layer.key_scales,
        check_values=os.environ.get("RECALKV_DEBUG") == "1",
    )


def _check_factors(layer: LatentLayer) -> None:
    k_up, head_dim = layer.k_up, layer.head_dim
    require_shape(k_up, "k_up", "G_k", "s·d", "width")
    require_dtype(k_up, "k_up", *DTYPES)
    groups, group_rows, width = k_up.shape
    require(
        head_dim > 0 and group_rows > 0 and group_rows % head_dim == 0,
        "k_up",
        f"a multiple of head_dim = {head_dim} rows per group",
        group_rows,
    )
    require(len(layer.k_spans) == groups, "k_spans", f"{groups} spans, as k_up", len(layer.k_spans))
    require_spans(layer.k_spans, "k_spans", width)
    num_kv_heads, v_groups = layer.num_kv_heads, len(layer.v_spans)
    require(
        v_groups > 0 and num_kv_heads % v_groups == 0,
        "v_spans",
        f"a number of spans that divides {num_kv_heads} KV heads",
        v_groups,
    )
    require_spans(layer.v_spans, "v_spans", layer.v_width)
    require_shape(layer.v_up, "v_up", num_kv_heads, head_dim, layer.v_width)
    require_dtype(layer.v_up, "v_up", k_up.dtype)
    require_device(layer.v_up, "v_up", k_up.device)


def _check_bands(layer: LatentLayer, latent_format: BandFormat) -> None:
    """Kernels are compiled for the bands of a span: all groups' must be alike."""
    for name, spans in (("k_spans", layer.k_spans), ("v_spans", layer.v_spans)):
        try:
            bands = {latent_format.within(span) for span in spans}
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        require(len(bands) == 1, "latent_format", f"the same bands in all of {name}", len(bands))


def _check_optional_tensors(layer: LatentLayer) -> None:
    shapes: dict[str, tuple[int | str, ...]] = {
        "cos_sin_cache": ("max_position", "rot_dim"),
        "k_bias": (layer.num_kv_heads, layer.head_dim),
        "v_bias": (layer.num_kv_heads, layer.head_dim),
        "sinks": ("h_q",),
    }
    norm = layer.k_norm_weight
    if norm is not None:
        all_heads = (layer.num_kv_heads,) if norm.dim() == 2 else ()
        shapes["k_norm_weight"] = (*all_heads, layer.head_dim)
    for name, shape in shapes.items():
        tensor = getattr(layer, name)
        if tensor is not None:
            require_shape(tensor, name, *shape)
            require_dtype(tensor, name, *DTYPES)
            require_device(tensor, name, layer.k_up.device)
    if layer.sinks is not None:
        heads = layer.sinks.shape[0]
        require(
            heads > 0 and heads % layer.num_kv_heads == 0,
            "sinks",
            f"a multiple of {layer.num_kv_heads} heads",
            heads,
        )
    if layer.cos_sin_cache is not None:
        require(
            0 < layer.rot_dim <= layer.head_dim and layer.rot_dim % 2 == 0,
            "cos_sin_cache",
            f"an even rot_dim of at most head_dim = {layer.head_dim}",
            layer.rot_dim,
        )


def _check_numbers(layer: LatentLayer) -> None:
    require(math.isfinite(layer.scale), "scale", "a finite number", layer.scale)
    require(layer.k_norm_eps >= 0, "k_norm_eps", "a number that is not negative", layer.k_norm_eps)
    require(
        layer.sliding_window is None or layer.sliding_window > 0,
        "sliding_window",
        "a positive number or None",
        layer.sliding_window,
    )
    require(
        layer.soft_cap is None or 0 < layer.soft_cap < math.inf,
        "soft_cap",
        "a positive number or None",
        layer.soft_cap,
    )
