"""Which part of an attention call a program computes: its queries, its rows, its tiles.

A program owns a block of queries of one sequence, for some heads, over all tiles of cached tokens
that they see or a piece of them. Every (query, head) of it is a row of its matrix products.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """The query rows of one program, each field ``[ROWS]``.

    Args:
        query: query, counted from the first of its sequence.
        live: whether there is such a query; the others are padding.
        token: its row of ``q``, int64.
        head: query head.
    """

    query: tl.tensor
    live: tl.tensor
    token: tl.tensor
    head: tl.tensor


@triton.jit
def find_sequence(query_start_loc, block, num_seqs, QUERY_BLOCK: tl.constexpr):
    """Index of the sequence that query block ``block`` belongs to, by bisection.

    Sequence ``i`` owns the blocks from ``start[i] // QUERY_BLOCK + i`` on: never fewer than its
    queries need, and ``tokens // QUERY_BLOCK + num_seqs`` in all, whatever the query lengths.
    """
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high) // 2
        first = tl.load(query_start_loc + middle) // QUERY_BLOCK + middle
        if first <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def find_queries(query_start_loc, block, num_seqs, QUERY_BLOCK: tl.constexpr, SEARCH: tl.constexpr):
    """``(sequence, row of q where the sequence starts, first query)`` of query block ``block``.

    Queries count from the start of their sequence. Without ``SEARCH`` every sequence is one block.
    """
    if SEARCH:
        block += tl.load(query_start_loc) // QUERY_BLOCK
        seq = find_sequence(query_start_loc, block, num_seqs, QUERY_BLOCK)
        start = tl.load(query_start_loc + seq)
        first_query = (block - start // QUERY_BLOCK - seq) * QUERY_BLOCK
    else:
        seq = block
        start = tl.load(query_start_loc + seq)
        first_query = 0
    return seq, start, first_query


@triton.jit
def query_range(query_start_loc, seq):
    """``(first row of q, number of queries)`` of a sequence."""
    start = tl.load(query_start_loc + seq)
    return start, tl.load(query_start_loc + seq + 1) - start


@triton.jit
def split_program(
    program,
    FIRST_V_BLOCK: tl.constexpr,
    V_BLOCKS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """``(block of value columns, first KV head, block of queries)`` of a program.

    Programs that read the same latents are neighbors, so that all but one hit L2.
    """
    v_block = FIRST_V_BLOCK + program % V_BLOCKS
    first_head = program // V_BLOCKS % HEAD_BLOCKS * HEADS
    return v_block, first_head, program // (V_BLOCKS * HEAD_BLOCKS)


@triton.jit
def load_piece(pieces, piece, QUERIES_PER_KV: tl.constexpr):
    """``(sequence, first query, first tile, end tile)`` of a piece of the work list."""
    entry = pieces + piece * 4
    first_query = tl.load(entry + 1) // QUERIES_PER_KV
    return tl.load(entry), first_query, tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def piece_rows(
    piece, first_query, rows,
    NUM_HEADS: tl.constexpr, QUERY_BLOCK: tl.constexpr, QUERIES_PER_KV: tl.constexpr,
):  # fmt: skip
    """Rows of the partial results ``[piece, KV head, row of the block]``, int64."""
    kv_head = rows.head // QUERIES_PER_KV
    place = (rows.query - first_query) * QUERIES_PER_KV + rows.head % QUERIES_PER_KV
    row = piece.to(tl.int64) * (NUM_HEADS // QUERIES_PER_KV) + kv_head
    return row * (QUERY_BLOCK * QUERIES_PER_KV) + place


@triton.jit
def locate_rows(
    start,
    first_query,
    num_queries,
    first_head,
    row,
    QUERY_BLOCK: tl.constexpr,
    Q_HEADS: tl.constexpr,
    QUERIES_PER_KV: tl.constexpr,
):
    """:class:`Rows` of ``QUERY_BLOCK`` queries from ``first_query`` on, times ``Q_HEADS`` heads.

    The heads of one query are neighbors; they begin with those of KV head ``first_head``. The
    sequence has ``num_queries`` queries, which start at row ``start`` of ``q``. ``row: [ROWS]``
    counts rows.
    """
    query = first_query + row // Q_HEADS
    return Rows(
        query=query,
        live=(row < QUERY_BLOCK * Q_HEADS) & (query < num_queries),
        token=(start + query).to(tl.int64),
        head=first_head * QUERIES_PER_KV + row % Q_HEADS,
    )


@triton.jit
def select_head(of_head, others, j, Q_HEADS: tl.constexpr, QUERIES_PER_KV: tl.constexpr):
    """``of_head: [TILE, ROWS]`` in the rows of the program's ``j``-th KV head, else ``others``."""
    row = tl.arange(0, others.shape[1])
    mine = row % Q_HEADS // QUERIES_PER_KV == j
    return tl.where(mine[None, :], of_head, others)


@triton.jit
def load_queries(
    q,
    rows,
    head_columns,
    order,
    stride_token,
    stride_head,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """``[DIM, ROWS]``: the rows' queries, component ``i`` from column ``head_columns[order[i]]``.

    Components from ``HEAD_DIM`` on and rows that are not live are zero.
    """
    source = q + rows.token * stride_token + rows.head * stride_head
    live = rows.live[None, :] & (tl.arange(0, DIM) < HEAD_DIM)[:, None]
    columns = tl.load(head_columns + order)
    return tl.load(source[None, :] + columns[:, None], mask=live, other=0.0)


@triton.jit
def visible_tiles(first_position, end, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """``(from, to)``: the tiles that any row of a program can see.

    The program's first query is at ``first_position``; no query of it sees tokens from ``end`` on.
    """
    first_tile = 0
    if WINDOW > 0:
        first_tile = tl.maximum(first_position - (WINDOW - 1), 0) // TILE
    return first_tile, tl.cdiv(end, TILE)
