"""Merge of the pieces of one attention call by their log-sum-exp.

Roofline. Pure traffic: ``pieces · (w_v + 1)`` float32 elements read and ``w_v + 1`` written per
query row, mostly from L2, where the attention kernel has just put them. Against ``length · rank``
cached elements per sequence this is small as long as a piece covers a few hundred tokens.

Data movement. One program per query row and column block; all log-sum-exps of the row are read at
once, then one partial result after the other. A row may see no token of a piece: it has minus
infinity there, and its partial result is not read.
"""

import triton
import triton.language as tl

from recalkv_vllm.kernels.work_list import find_pieces


@triton.jit(
    do_not_specialize=["num_seqs", "first_token", "num_heads", "per_kv", "rows"],
    do_not_specialize_on_alignment=["partial_lse", "query_start_loc", "lse"],
)
def merge_pieces(
    partial,
    partial_lse,
    query_start_loc,
    first_piece,
    out,
    lse,
    num_seqs,
    first_token,
    num_heads,
    per_kv,
    rows,
    V_WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    MAX_PIECES: tl.constexpr,
):
    """``partial: [pieces, KV heads, rows, V_WIDTH]``, ``partial_lse`` alike, both float32.

    ``out`` and ``lse`` start at row ``first_token`` of ``q``; see ``find_pieces``.
    """
    row = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    head = row % num_heads
    first, count, place = find_pieces(
        query_start_loc, first_piece, first_token + row // num_heads, head % per_kv,
        row >= 0, num_seqs, rows, per_kv,
    )  # fmt: skip
    step = num_heads // per_kv * rows
    own = first.to(tl.int64) * step + head // per_kv * rows + place
    piece = tl.arange(0, MAX_PIECES)
    logs = tl.load(partial_lse + own + piece * step, mask=piece < count, other=float("-inf"))
    highest = tl.max(logs, axis=0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp(logs - shift), axis=0)
    inverse = tl.where(total == 0, 0.0, 1 / total)  # a NaN stays a NaN
    acc = tl.zeros([COLUMNS], tl.float32)
    for _ in tl.range(0, count):
        log = tl.load(partial_lse + own)
        if log > float("-inf"):
            source = partial + own * V_WIDTH + column
            acc += tl.exp(log - shift) * tl.load(source, mask=column < V_WIDTH, other=0.0)
        own += step
    row = row.to(tl.int64)
    tl.store(out + row * V_WIDTH + column, acc * inverse, mask=column < V_WIDTH)
    if tl.program_id(1) == 0:
        merged = tl.where(total == 0, float("-inf"), shift + tl.log(total))
        tl.store(lse + row, merged)
