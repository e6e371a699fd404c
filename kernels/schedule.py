"""A work list of equal shares, made on the device: see ``pieces.py``.

Roofline. One program per share reads all sequence lengths and writes four numbers: nothing beside
a launch. The host reads nothing, and sizes depend on the grid and the batch alone, so that a graph
can hold it; a captured graph cuts every batch anew.
"""

import triton
import triton.language as tl


@triton.jit
def schedule_shares(
    seq_lens,
    shares,
    num_seqs,
    PROGRAMS: tl.constexpr,
    TILE: tl.constexpr,
    START_TILES: tl.constexpr,
    SEQS: tl.constexpr,
):
    """Write ``shares[program] = (first sequence, its first tile, last sequence, its end tile)``.

    A program owns tiles from the first to the end; of sequences between them, all. With nothing to
    do its last sequence is before its first. ``SEQS`` is a power of two of at least ``num_seqs``.
    """
    program = tl.program_id(0)
    seq = tl.arange(0, SEQS)
    length = tl.load(seq_lens + seq, mask=seq < num_seqs, other=0)
    tiles = (length + TILE - 1) // TILE
    costs = tl.where(tiles > 0, tiles + START_TILES, 0)
    ends = tl.cumsum(costs, 0)
    total = tl.sum(costs, 0)
    share = (total + PROGRAMS - 1) // PROGRAMS
    low = tl.minimum(program * share, total)
    high = tl.minimum(low + share, total)
    # A sequence's start is worth tiles that have no token: a share that ends in them has none.
    first = tl.sum((ends <= low).to(tl.int32), 0)
    last = tl.sum((ends < high).to(tl.int32), 0)
    first_start = tl.sum(tl.where(seq < first, costs, 0), 0)
    last_start = tl.sum(tl.where(seq < last, costs, 0), 0)
    first_tile = tl.maximum(0, low - first_start - START_TILES)
    end_tile = tl.maximum(0, high - last_start - START_TILES)
    if high <= low:
        first, last = num_seqs, num_seqs - 1
        first_tile, end_tile = 0, 0
    row = shares + program * 4
    tl.store(row, first)
    tl.store(row + 1, first_tile)
    tl.store(row + 2, last)
    tl.store(row + 3, end_tile)
