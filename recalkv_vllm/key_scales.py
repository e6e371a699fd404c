"""Inverse root mean squares of keys, in the paged cache beside the latents.

An RMS norm divides a key by one number per token: its head's root mean square, or that of all heads
of the token. Attention multiplies scores by the inverse, and needs no whole key for it. It is
computed when a token is cached, of the keys that its latent gives *as stored*, so that rounding and
quantization of latents make no difference between a key and its norm.

A page of ``block_size`` tokens holds their latents first, laid out as ever, then ``count`` float32
for each token: one per KV head, or a single one. Scores are as exact as they are only in float32:
16 bits would be off by more than the rounding of all the products that make a score.
"""

from __future__ import annotations

import torch

KEY_SCALE_BYTES = 4


def latent_width(slot_width: int, itemsize: int, count: int) -> int:
    """Elements, of ``itemsize`` bytes, of a token's latent in a slot that has ``count`` scales."""
    return slot_width - KEY_SCALE_BYTES // itemsize * count


def split_pages(kv_cache: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Latents ``[num_blocks, block_size, width]`` and scales ``[num_blocks, block_size, count]``.

    They are views of the paged cache ``[num_blocks, block_size, slot width]``; no scales are None.
    Without scales, the cache is its latents and may have any strides; with them, blocks are
    contiguous.
    """
    if count == 0:
        return kv_cache, None
    num_blocks, block_size, slot = kv_cache.shape
    width = latent_width(slot, kv_cache.element_size(), count)
    latents = kv_cache.as_strided((num_blocks, block_size, width), (kv_cache.stride(0), width, 1))
    flat = kv_cache.as_strided((num_blocks, block_size * slot), (kv_cache.stride(0), 1))
    scales = flat[:, block_size * width :].view(torch.float32)
    return latents, scales.unflatten(1, (block_size, count))
