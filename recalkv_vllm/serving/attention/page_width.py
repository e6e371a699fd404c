"""How wide the slots of a cache page are where layers of several ranks share cache groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def slot_widths(own: Sequence[int], kinds_differ: bool, hybrid: bool = False) -> tuple[int, ...]:
    """Width of a slot that each layer asks vLLM for, of the ``own`` width that it needs.

    In a model of which some layers have a sliding window, vLLM makes all pages equally large, and
    a cache group, with a block table of its own, of every layer whose page differs from its
    neighbors'. Asking for the widest slot everywhere takes the same memory and leaves one group
    per repetition of the model's pattern, as for the dense model. Can go when vLLM groups layers
    by window alone.

    Args:
        own: of every layer of the model.
        kinds_differ: some layers have a sliding window and some do not.
        hybrid: some layers have no attention; their page is made as large as a block of a layer
            with, for which vLLM takes one size of all.
    """
    widest = max(own)
    if hybrid:
        return (widest,) * len(own)
    # If all divide the widest, vLLM gives the narrow ones longer blocks, and no byte is lost.
    if not kinds_differ or all(widest % width == 0 for width in own):
        return tuple(own)
    return (widest,) * len(own)


def own_slots(kv_cache: torch.Tensor, width: int) -> torch.Tensor:
    """Pages ``[blocks, 1, block_size, wider]`` as ``[blocks, block_size, width]``, dense from
    their starts."""
    blocks, _, block_size, wider = kv_cache.shape
    if wider == width:
        return kv_cache.squeeze(1)
    return kv_cache.as_strided((blocks, block_size, width), (kv_cache.stride(0), width, 1))
