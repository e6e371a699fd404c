"""Splits of the cached tokens of split-KV decoding: how many are worth their merge."""

from __future__ import annotations

#: Partial results of more splits cost more to merge than they win.
MAX_SPLITS = 64


def cheapest_split(programs: int, slots: int, tiles: int, most: int) -> int:
    """The cheapest of 1 to ``most`` splits.

    Minimizes waves of programs times tiles per program, with two tiles' worth of start-up each.

    Args:
        programs: of one split.
        slots: programs that run at once.
        tiles: of the longest sequence.
        most: at least 1.
    """

    def cost(splits: int) -> float:
        waves = -(-programs * splits // slots)
        return waves * (-(-tiles // splits) + 2) + 0.01 * splits

    return min(range(1, most + 1), key=cost)
