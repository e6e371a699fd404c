"""Work list of one step: the cached tokens of a batch, cut into pieces of nearly equal cost.

A row block is up to ``ROWS`` query rows of one sequence under each KV head: row ``r`` is query
``r // QUERIES_PER_KV``. Sequence ``i`` owns the row blocks from ``start[i] · QUERIES_PER_KV // ROWS
+ i`` on, counted from the first sequence's: never fewer than its queries need, whatever their
number. Those that it does not need have no pieces.

One program cuts all, once per step, within the bounds that the host knows (``pieces.py``): nothing
on the device is read by the host, and a captured graph cuts whatever it is replayed on.
"""

import triton
import triton.language as tl


@triton.jit
def find_sequence_of(query_start_loc, wanted, num_seqs, rows, per_kv, BLOCKS: tl.constexpr):
    """Index of the sequence that owns ``wanted``, any shape, by bisection.

    ``wanted`` are row blocks if ``BLOCKS``, else rows of ``q``, of which no sequence follows.
    """
    low = wanted * 0
    high = low + num_seqs
    reach = num_seqs
    while reach > 0:
        middle = (low + high) // 2
        searched = low < high
        first = tl.load(query_start_loc + middle, mask=searched, other=0)
        if BLOCKS:
            first = first * per_kv // rows + middle
        below = searched & (first <= wanted)
        low = tl.where(below, middle + 1, low)
        high = tl.where(searched & ~below, middle, high)
        reach = reach // 2
    return low - 1


@triton.jit
def count_tiles(
    seq_lens, query_start_loc, block, num_blocks, num_seqs, rows, per_kv, tile, window
):  # fmt: skip
    """``(sequence, first row, first tile, tiles)`` of row blocks: the tiles that any row sees."""
    before = tl.load(query_start_loc) * per_kv // rows
    seq = find_sequence_of(query_start_loc, block + before, num_seqs, rows, per_kv, BLOCKS=True)
    start = tl.load(query_start_loc + seq)
    queries = tl.load(query_start_loc + seq + 1) - start
    length = tl.load(seq_lens + seq)
    begin = (block + before - start * per_kv // rows - seq) * rows
    last = tl.minimum(begin + rows, queries * per_kv) - 1
    context = length - queries
    first_tile = tl.maximum(context + begin // per_kv - (window - 1), 0) // tile
    first_tile = tl.where(window > 0, first_tile, 0)
    tiles = tl.cdiv(tl.minimum(context + last // per_kv + 1, length), tile) - first_tile
    # Padding has no length: its queries would be before the first token.
    some = (block < num_blocks) & (begin <= last) & (tiles > 0)
    return seq, begin, first_tile, tl.where(some, tiles, 0)


@triton.jit
def smallest_share(tiles, most, MAX_PIECES: tl.constexpr):
    """Least tiles per piece with which all row blocks together need no more than ``most``."""
    high = tl.maximum(tl.max(tiles, axis=0), 1)
    low = tl.maximum(tl.cdiv(high, MAX_PIECES), tl.cdiv(tl.sum(tiles, axis=0), most))
    low = tl.minimum(tl.maximum(low, 1), high)
    while low < high:
        middle = (low + high) // 2
        if tl.sum(tl.cdiv(tiles, middle), axis=0) <= most:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def cheapest_share(
    tiles, capacity, at_once,
    MAX_PIECES: tl.constexpr, MAX_WAVES: tl.constexpr, START_UP: tl.constexpr,
):  # fmt: skip
    """Tiles per piece at which the last piece is done first, of those that fill 1, 2, ... waves.

    Waves of pieces take no longer than each its longest. Nor do pieces take longer, as one starts
    wherever another ends, than all of them spread evenly, and one more (Graham, 1966).
    """
    total = tl.sum(tiles, axis=0)
    best = tl.maximum(tl.max(tiles, axis=0), 1)
    least = tl.full([], 2147483647, tl.int32)
    for waves in tl.static_range(1, MAX_WAVES + 1):
        most = tl.minimum(waves * at_once, capacity)
        share = smallest_share(tiles, most, MAX_PIECES)
        pieces = tl.sum(tl.cdiv(tiles, share), axis=0)
        spent = share + START_UP
        in_waves = tl.cdiv(pieces, at_once) * at_once * spent
        spread = total + START_UP * pieces + (at_once - 1) * spent
        cost = tl.minimum(in_waves, spread)
        better = (pieces <= most) & (cost < least)
        best = tl.where(better, share, best)
        least = tl.where(better, cost, least)
    return best


@triton.jit(
    do_not_specialize=[
        "num_seqs", "num_blocks", "capacity", "at_once", "rows", "per_kv", "tile", "window",
    ],
    do_not_specialize_on_alignment=["seq_lens", "query_start_loc"],
)  # fmt: skip
def cut_batch(
    seq_lens,
    query_start_loc,
    pieces,
    first_piece,
    num_seqs,
    num_blocks,
    capacity,
    at_once,
    rows,
    per_kv,
    tile,
    window,
    LANES: tl.constexpr,
    MAX_PIECES: tl.constexpr,
    MAX_WAVES: tl.constexpr,
    START_UP: tl.constexpr,
):
    """Write the work list, int32, by one program; ``LANES`` are no fewer than blocks or pieces.

    ``pieces: [capacity, 4]`` are (sequence, first row, first tile, end tile), all zero behind the
    last one. ``first_piece: [num_blocks + 1]``: row block ``i`` owns the pieces from the ``i``-th
    to the next entry.
    """
    block = tl.arange(0, LANES)
    seq, begin, first_tile, tiles = count_tiles(
        seq_lens, query_start_loc, block, num_blocks, num_seqs, rows, per_kv, tile, window
    )
    share = cheapest_share(tiles, capacity, at_once, MAX_PIECES, MAX_WAVES, START_UP)
    count = tl.cdiv(tiles, share)
    end = tl.cumsum(count, axis=0)
    tl.store(first_piece + block, end - count, mask=block < num_blocks)
    used = tl.sum(count, axis=0)
    tl.store(first_piece + num_blocks, used)
    for i in tl.range(0, tl.max(count, axis=0)):
        own = i < count
        parts = tl.maximum(count, 1)
        entry = pieces + (end - count + i) * 4
        tl.store(entry, seq, mask=own)
        tl.store(entry + 1, begin, mask=own)
        tl.store(entry + 2, first_tile + i * tiles // parts, mask=own)
        tl.store(entry + 3, first_tile + (i + 1) * tiles // parts, mask=own)
    unused = pieces + block * 4
    behind = (block >= used) & (block < capacity)
    for i in tl.static_range(4):
        tl.store(unused + i, 0, mask=behind)


@triton.jit
def find_pieces(query_start_loc, first_piece, token, head_in_group, live, num_seqs, rows, per_kv):
    """``(first piece, pieces, place)`` of query rows: their row block's, and their place in it.

    ``token`` are rows of ``q``, ``head_in_group`` query heads under the KV head. Rows of no
    sequence, which a padded batch has behind the others, have no pieces.
    """
    live = live & (token < tl.load(query_start_loc + num_seqs))
    token = tl.where(live, token, 0)
    seq = find_sequence_of(query_start_loc, token, num_seqs, rows, per_kv, BLOCKS=False)
    seq = tl.maximum(seq, 0)
    start = tl.load(query_start_loc + seq)
    row = (token - start) * per_kv + head_in_group
    before = tl.load(query_start_loc) * per_kv // rows
    block = start * per_kv // rows - before + seq + row // rows
    first = tl.load(first_piece + block, mask=live, other=0)
    count = tl.load(first_piece + block + 1, mask=live, other=0) - first
    return first, count, row % rows
