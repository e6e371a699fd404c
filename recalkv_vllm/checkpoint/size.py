"""What a compressed cache takes."""

from __future__ import annotations

import math

from recalkv_vllm.band_format import token_bytes
from recalkv_vllm.checkpoint.config import RecalkvConfig
from recalkv_vllm.checkpoint.geometry import AttentionGeometry
from recalkv_vllm.checkpoint.layout import SPAN_MULTIPLE


def compression_reached(config: RecalkvConfig, geometry: AttentionGeometry) -> float:
    """Fraction of KV-cache bytes actually removed from a cache of 16-bit elements."""
    sizes = kv_bytes_per_token(config, geometry, 2)
    return 1 - sizes["compressed"] / sizes["dense"]


def kv_bytes_per_token(
    config: RecalkvConfig, geometry: AttentionGeometry, itemsize: int
) -> dict[str, int]:
    """KV-cache bytes per token over all layers, for elements of ``itemsize`` bytes.

    Quantized latents take what their format takes, whatever the ``itemsize``; normed keys come with
    scales of their own.
    """
    scales = geometry.key_scales()
    return {
        "dense": geometry.dense_width * geometry.num_layers * itemsize,
        "compressed": sum(
            token_bytes(config.latent_format(i), layer.rank, itemsize, scales)
            for i, layer in enumerate(config.layers)
        ),
    }


def rank_budget(compression: float, geometry: AttentionGeometry) -> int:
    """Elements per token that ``compression`` leaves, over all layers, in whole span steps.

    Rounded down, so that a checkpoint never holds more bytes than asked for.
    """
    dense = geometry.dense_width * geometry.num_layers
    # 1e-9: (1 - 0.9) · dense must not fall below an exact multiple by rounding of the float.
    return math.floor((1 - compression) * dense / SPAN_MULTIPLE + 1e-9) * SPAN_MULTIPLE
