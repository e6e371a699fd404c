"""Chunks of latents like cached ones: columns correlated with one another and between layers."""

from __future__ import annotations

import numpy as np
import torch

from recalkv_vllm.band_format import BandFormat
from recalkv_vllm.serving.cold_tier.chunk_layout import ChunkLayout, LayerPages

#: Bands of every bit width; the last has padding in its slots.
BANDS = (
    ((32, 8), (32, 6), (32, 4)),
    ((32, 6), (64, 3)),
    ((64, 4), (32, 2)),
)
BLOCK_SIZE, BLOCKS = 8, 2
#: Bytes behind the last page.
PADDING = 13


def layout(bands=BANDS, block_size=BLOCK_SIZE, blocks=BLOCKS) -> ChunkLayout:
    """A chunk of ``blocks`` pages of each layer, one layer after the other."""
    layers, start = [], 0
    for i, of_layer in enumerate(bands):
        latents = BandFormat(of_layer)
        page = block_size * latents.slot_bytes(latents.rank)
        starts = tuple(range(start, start + blocks * page, page))
        layers.append(LayerPages(starts, block_size, latents, lowest=i == 0))
        start += blocks * page
    return ChunkLayout(start + PADDING, tuple(layers))


def correlated(chunks: int, seed: int, of: ChunkLayout | None = None) -> np.ndarray:
    """``[chunks, size]``: every layer's latents are a product of nearly the same hidden states."""
    of = of or layout()
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(24, layer.latents.rank, generator=generator) for layer in of.layers]
    generator.manual_seed(seed)
    hidden = torch.randn(chunks * of.tokens, 24, generator=generator)
    out = np.random.default_rng(seed).integers(256, size=(chunks, of.size), dtype=np.uint8)
    for layer, to_latents in zip(of.layers, maps, strict=True):
        hidden = hidden + 0.1 * torch.randn(hidden.shape, generator=generator)
        codes, scales = layer.latents.quantize(hidden @ to_latents / 5)
        packed = layer.latents.pack(codes)
        shape = (chunks, len(layer.starts), layer.block_size, -1)
        parts = packed.reshape(shape).numpy(), scales.reshape(shape).numpy()
        for i, start in enumerate(layer.starts):
            page = np.concatenate([part[:, i].reshape(chunks, -1) for part in parts], axis=1)
            out[:, start : start + page.shape[1]] = page
    return out
