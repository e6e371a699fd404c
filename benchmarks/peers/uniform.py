"""Rounding to equal steps between the least and the greatest of a group."""

from __future__ import annotations

import torch

#: The least positive number of float16: a scale is never zero.
LEAST = 2.0**-24


def half(x: torch.Tensor) -> torch.Tensor:
    """As float16 stores it."""
    return x.half().float()


def affine(x: torch.Tensor, bits: int, clip: float = 1.0) -> torch.Tensor:
    """Round groups, the last dimension, to ``2^bits`` levels; scale and offset are float16.

    Args:
        x: ``[..., group]`` float32.
        bits: of a code.
        clip: part of the range, from both of its ends to zero, that has levels.
    """
    low, high = (clip * end for end in (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)))
    levels = 2**bits - 1
    scale = half(((high - low) / levels).clamp_min(LEAST))
    low = half(low)
    return ((x - low) / scale).round().clamp(0, levels) * scale + low


def affine_bytes(elements: int, bits: int, group: int) -> float:
    """Bytes of so many elements with a float16 scale and offset for each group."""
    return elements * bits / 8 + 4 * elements / group


def channel_groups(x: torch.Tensor, group: int) -> torch.Tensor:
    """``[..., d]`` as ``[..., d / group, group]``."""
    return x.unflatten(-1, (-1, group))
