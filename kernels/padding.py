"""Rows of no sequence: those after the last sequence's, which a padded batch has.

What follows in a model may take a maximum over all rows, so they must hold something defined. No
launch of its own clears them: a program with fewer queries than it has places for takes as many of
these rows instead, in order. All programs of a launch together have places for all of its rows.
"""

import triton
import triton.language as tl

from recalkv_vllm.kernels.softmax import zeros


@triton.jit
def first_padding_row(
    query_start_loc, num_seqs, block, start, first_query, num_queries, QUERY_BLOCK: tl.constexpr
):
    """The row of ``q`` that the first free place of query block ``block`` takes.

    The block starts at query ``first_query`` of a sequence of ``num_queries``, whose own rows start
    at ``start``. Earlier blocks have ``block · QUERY_BLOCK`` places for the rows before it.
    """
    before = start - tl.load(query_start_loc) + tl.minimum(first_query, num_queries)
    return tl.load(query_start_loc + num_seqs) + block * QUERY_BLOCK - before


@triton.jit
def locate_padding(
    padding, owned, end, first_head,
    QUERY_BLOCK: tl.constexpr, Q_HEADS: tl.constexpr, QUERIES_PER_KV: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """``(live, token, head)``, each ``[ROWS]``: what the places from ``owned`` on take.

    Rows of ``q`` from ``padding`` on, as far as they are below ``end``.
    """
    row = tl.arange(0, ROWS)
    place = row // Q_HEADS
    token = padding + place - owned
    live = (place >= owned) & (place < QUERY_BLOCK) & (token < end)
    return live, token.to(tl.int64), first_head * QUERIES_PER_KV + row % Q_HEADS


@triton.jit
def store_zeros(out_row, live, V_CHUNKS: tl.constexpr):
    """Zeros from the pointers ``out_row: [ROWS]`` on, for live rows."""
    for c in tl.static_range(len(V_CHUNKS)):
        columns = V_CHUNKS[c][0] + tl.arange(0, V_CHUNKS[c][1])
        target = out_row[None, :] + columns[:, None]
        tl.store(target, zeros(V_CHUNKS[c][1], out_row.shape[0]), mask=live[None, :])
