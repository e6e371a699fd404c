"""How many programs share the cached tokens of a sequence (split-KV decoding)."""

from __future__ import annotations

from functools import cache

from recalkv_vllm.kernels.heuristics.targets import Target

#: Partial results of more splits cost more to merge than they win.
MAX_SPLITS = 64


def most_programs(target: Target) -> int:
    """Programs times splits at most: four waves of two programs per multiprocessor."""
    return 8 * target.num_sms


@cache
def split_count(programs: int, max_tiles: int, target: Target) -> int:
    """Splits of the cached tokens: fixed by shapes alone, so that a graph can hold it.

    Minimizes waves of programs times tiles per program, with two tiles' worth of start-up each.
    The bound on programs bounds the workspace too.
    """
    slots = 2 * target.num_sms
    most = max(1, min(MAX_SPLITS, max_tiles, most_programs(target) // programs))

    def cost(splits: int) -> float:
        waves = -(-programs * splits // slots)
        return waves * (-(-max_tiles // splits) + 2) + 0.01 * splits

    return min(range(1, most + 1), key=cost)
