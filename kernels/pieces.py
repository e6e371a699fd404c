"""Cached tokens of a batch in pieces of equal cost, one range of them for every program of a grid.

Splits of equal number give every sequence as many programs as any other, however long it is. Here
all tiles of a batch lie in a row, sequence after sequence, each with a few more for what a piece
costs before its first tile, and every program takes as long a part of the row. Where a part crosses
the edge of sequences, it is several pieces.

Pieces are numbered in order, so that program ``p`` and sequence ``s`` have the piece ``p + s``: the
next piece has the next program, the next sequence, or both. A workspace of ``programs + num_seqs``
partial results holds those of any batch, and those of sequence ``s`` are the pieces from
``first_program(s) + s`` to ``last_program(s) + s``, which is all that a merge has to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

#: Tiles' worth of work before the first tile of a sequence: as of a split (``splits.py``).
START_TILES = 2


class Piece(NamedTuple):
    """Tiles ``[first, end)`` of a sequence that one program owns."""

    program: int
    sequence: int
    first: int
    end: int


def cut(tiles: Sequence[int], programs: int) -> list[Piece]:
    """Pieces of a batch, in order; what ``schedule.py`` computes on the device.

    Args:
        tiles: of each sequence.
        programs: that take part.
    """
    costs = [count + START_TILES if count else 0 for count in tiles]
    share = -(-sum(costs) // programs)
    pieces, start = [], 0
    for sequence, (count, cost) in enumerate(zip(tiles, costs, strict=True)):
        for program in range(start // max(1, share), programs):
            low, high = program * share - start, (program + 1) * share - start
            if low >= cost:
                break
            first = min(count, max(0, low - START_TILES))
            end = min(count, max(0, high - START_TILES))
            if first < end:
                pieces.append(Piece(program, sequence, first, end))
        start += cost
    return pieces


def makespan(pieces: Sequence[Piece]) -> int:
    """Tiles, and starts of pieces, of the program that has most."""
    spent: dict[int, int] = {}
    for piece in pieces:
        cost = piece.end - piece.first + START_TILES
        spent[piece.program] = spent.get(piece.program, 0) + cost
    return max(spent.values(), default=0)
