"""Pieces that the cached tokens of a batch are cut into: how many there may be, by shapes alone.

A piece is a range of tiles of one row block. Which ranges there are depends on the lengths of
sequences, which only the device knows: ``work_list.py`` cuts them there, within these bounds.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

#: Of a row block at most: partial results of more cost more to merge than they win.
MAX_PIECES = 64
#: What a piece costs besides its tiles, in tiles.
START_UP = 2
#: Pieces at most, in waves; this bounds the workspace, too.
MAX_WAVES = 4


class Bounds(NamedTuple):
    """Of one call's pieces.

    Args:
        capacity: pieces at most, what grids and the workspace are made for.
        at_once: pieces that run at once, a wave.
    """

    capacity: int
    at_once: int


@cache
def piece_bounds(row_blocks: int, programs: int, slots: int, longest: int) -> Bounds | None:
    """Bounds for a call; None if its row blocks are not cut.

    Lengths may differ as much as they like, so a call is cut unless there are so many row blocks
    that they even out, or so few places that cutting wins nothing. Several pieces for each row
    block let waves be full whatever the remainders; more than these would only start and find
    nothing to do.

    Args:
        row_blocks: at most.
        programs: of one piece.
        slots: programs that run at once.
        longest: tiles of a sequence at most.
    """
    at_once = slots // programs
    if at_once < 2 or longest < 2 or row_blocks > MAX_WAVES // 2 * at_once:
        return None
    most = row_blocks * min(MAX_PIECES, longest)
    return Bounds(min(MAX_WAVES * at_once, at_once + 4 * row_blocks, most), at_once)
