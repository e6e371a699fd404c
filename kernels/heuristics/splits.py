"""How many programs share the cached tokens of a sequence (split-KV decoding)."""

from __future__ import annotations

from functools import cache

from recalkv_vllm.kernels.heuristics.targets import Target
from recalkv_vllm.kernels.splits import MAX_SPLITS, cheapest_split


def most_programs(target: Target) -> int:
    """Programs times splits at most: four waves of two programs per multiprocessor."""
    return 8 * target.num_sms


@cache
def split_count(programs: int, max_tiles: int, target: Target) -> int:
    """Splits of the cached tokens: fixed by shapes alone, so that a graph can hold it.

    The bound on programs bounds the workspace too.
    """
    most = max(1, min(MAX_SPLITS, max_tiles, most_programs(target) // programs))
    return cheapest_split(programs, 2 * target.num_sms, max_tiles, most)
