"""How long the longest of a device's multiprocessors attends, in tiles: what pieces win.

    python -m recalkv_vllm.benchmarks.makespan

Simulates one layer's decode on an H100: programs start in order wherever one ends, and take their
tiles and a start-up each. No kernel runs, and no memory is modeled.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable

from recalkv_vllm.kernels.pieces import MAX_PIECES, MAX_WAVES, START_UP, Bounds, piece_bounds

#: Two programs on each of an H100's multiprocessors; 8 KV heads are a program each.
SLOTS = 2 * 132
KV_HEADS = 8
TILE = 64


def lognormal(count: int, seed: int = 0) -> list[int]:
    """Lengths of which half are below 3000 and a few above 20000."""
    draw = random.Random(seed).lognormvariate
    return [int(draw(8, 1)) + 1 for _ in range(count)]


#: Cached tokens of each sequence.
BATCHES = {
    "1 × 32k": [32 << 10],
    "8 × 32k": [32 << 10] * 8,
    "20 × 32k": [32 << 10] * 20,
    "1 × 128k, 7 × 1k": [128 << 10] + [1 << 10] * 7,
    "1 × 128k, 63 × 1k": [128 << 10] + [1 << 10] * 63,
    "16, lognormal": lognormal(16),
    "64, lognormal": lognormal(64),
}


def cut_tiles(tiles: list[int], bounds: Bounds) -> list[list[int]]:
    """Tiles of each piece of row blocks of ``tiles``: what ``work_list.py`` says, plainly."""
    found = []
    for waves in range(1, MAX_WAVES + 1):
        most = min(waves * bounds.at_once, bounds.capacity)
        share = max(1, -(-max(tiles, default=0) // MAX_PIECES), -(-sum(tiles) // most))
        longest = max(tiles, default=1)
        while share < longest and pieces_at(tiles, share) > most:
            share += 1
        share, pieces = min(share, longest), pieces_at(tiles, min(share, longest))
        spent = share + START_UP
        in_waves = -(-pieces // bounds.at_once) * bounds.at_once * spent
        spread = sum(tiles) + START_UP * pieces + (bounds.at_once - 1) * spent
        if pieces <= most:
            found.append((min(in_waves, spread), waves, share))
    share = min(found)[2] if found else max(tiles)
    counts = [-(-n // share) for n in tiles]
    return [
        [(i + 1) * n // count - i * n // count for i in range(count)]
        for n, count in zip(tiles, counts, strict=True)
    ]


def pieces_at(tiles: Iterable[int], share: int) -> int:
    """Pieces of up to ``share`` tiles."""
    return sum(-(-n // share) for n in tiles)


def equal_splits(tiles: list[int]) -> list[int]:
    """Tiles of each program by the rule of one number of splits for all sequences.

    The least ``waves · (ceil(longest / splits) + 2) + splits / 100``, of up to 64 splits and four
    waves of programs.
    """
    longest, programs = max(tiles), len(tiles) * KV_HEADS

    def cost(splits: int) -> float:
        waves = -(-programs * splits // SLOTS)
        return waves * (-(-longest // splits) + 2) + 0.01 * splits

    splits = min(range(1, max(1, min(64, longest, 4 * SLOTS // programs)) + 1), key=cost)
    starts = [(n, i * -(-n // splits)) for i in range(splits) for n in tiles]
    return [min(-(-n // splits), n - start) for n, start in starts if start < n]


def makespan(programs: Iterable[int]) -> int:
    """When the last one ends, each having started where one ended first."""
    ends = [0] * (SLOTS // KV_HEADS)
    for tiles in programs:
        heapq.heapreplace(ends, ends[0] + tiles + START_UP)
    return max(ends)


def main() -> None:
    """Print a table."""
    print("| Sequences | Equal splits | Work list | Lower bound |")
    print("|:--|--:|--:|--:|")
    for name, lengths in BATCHES.items():
        tiles = [-(-length // TILE) for length in lengths]
        bounds = piece_bounds(len(tiles), KV_HEADS, SLOTS, max(tiles))
        cut = [[n] for n in tiles] if bounds is None else cut_tiles(tiles, bounds)
        places = SLOTS // KV_HEADS
        least = -(-(sum(tiles) + START_UP * len(tiles)) // places)
        pieces = [n for row_block in cut for n in row_block]
        print(f"| {name} | {makespan(equal_splits(tiles))} | {makespan(pieces)} | {least} |")


if __name__ == "__main__":
    main()
