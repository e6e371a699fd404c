"""Value up-projection: from per-head value latents, or partial results of them, to head outputs.

Roofline. ``2·d·w_v`` FLOP per query row against ``h_kv·d·w_v`` elements of ``v_up`` read once per
call: with few rows (decode) bound by reading the factor from L2 or memory, with many by the tensor
cores, like any linear layer.

Data movement. One program per (KV head, block of query rows, block of output columns); the query
heads that share a KV head are rows of one product, so the factor is read once for all of them.
Latents are rounded to the factor's dtype on chip, unless they come in it. Partial results of a call
whose cached tokens were cut into pieces are merged on the way in, by their log-sum-exp: merging
needs neither a launch nor a trip through memory of its own.
"""

import triton
import triton.language as tl

from recalkv_vllm.kernels.work_list import find_pieces


@triton.jit
def piece_weights(partial_lse, count, step, MAX_PIECES: tl.constexpr):
    """``(shift, inverse)``, each ``[ROWS]``: a piece of log-sum-exp ``l`` weighs ``exp(l - shift) ·
    inverse``. ``partial_lse: [ROWS]`` points at the rows' first of ``count`` pieces."""
    piece = tl.arange(0, MAX_PIECES)
    logs = tl.load(
        partial_lse[:, None] + (piece * step)[None, :],
        mask=piece[None, :] < count[:, None],
        other=float("-inf"),
    )
    highest = tl.max(logs, axis=1)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp(logs - shift[:, None]), axis=1)
    return shift, tl.where(total == 0, 0.0, 1 / total)  # a NaN stays a NaN


@triton.jit
def shares_beside_sinks(sinks, log):
    """``[ROWS]``: a row's sum of weights ``exp(log)`` over the same with its sink, to which
    ``sinks`` points."""
    sink = tl.load(sinks).to(tl.float32)
    # Without tokens all is the sink's.
    return tl.where(log == float("-inf"), 0.0, 1 / (1 + tl.exp(sink - log)))


@triton.jit
def merge_columns(
    source, partial_lse, shift, inverse, count, step, V_WIDTH: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """The pieces' weighted sum of the columns at ``source: [ROWS, DEPTH]``.

    A piece of which a row saw no token is read, so that loads need not wait for its log-sum-exp,
    and dropped.
    """
    merged = tl.zeros(source.shape, tl.float32)
    for i in tl.range(0, tl.max(count, axis=0), num_stages=STAGES):
        log = tl.load(partial_lse, mask=i < count, other=float("-inf"))
        part = tl.load(source, mask=(i < count)[:, None], other=0.0)
        weight = tl.exp(log - shift) * inverse
        merged += tl.where((log == float("-inf"))[:, None], 0.0, weight[:, None] * part)
        partial_lse += step
        source += step * V_WIDTH
    return merged


@triton.jit(
    do_not_specialize=["tokens", "num_seqs", "first_token", "block_rows"],
    do_not_specialize_on_alignment=["lse", "query_start_loc"],
)
def project_values(
    o_lat,
    lse,
    query_start_loc,
    first_piece,
    v_up,
    v_bias,
    sinks,
    out,
    tokens,
    num_seqs,
    first_token,
    block_rows,
    stride_token,
    stride_head,
    stride_out_token,
    stride_out_head,
    QUERIES_PER_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    MAX_PIECES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``out[t, h] = v_up[h // QUERIES_PER_KV] @ o_lat[t, h] (+ v_bias)``; DEPTH divides V_WIDTH.

    With ``first_piece``, ``o_lat`` and ``lse`` are partial results ``[pieces, KV heads, block_rows,
    ...]`` of a work list, and ``first_token`` is the row of ``q`` of the first output; see
    ``find_pieces``. ``sinks: [heads]`` take their shares of the outputs by ``lse``.
    """
    kv_head = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = (row // QUERIES_PER_KV).to(tl.int64)
    head = kv_head * QUERIES_PER_KV + row % QUERIES_PER_KV
    live = token < tokens
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    wanted = column < HEAD_DIM
    depth = tl.arange(0, DEPTH)
    factor = v_up + (kv_head * HEAD_DIM + column) * V_WIDTH
    if first_piece is None:
        latents = o_lat + token * stride_token + head * stride_head
    else:
        first, count, place = find_pieces(
            query_start_loc, first_piece, first_token + row // QUERIES_PER_KV,
            row % QUERIES_PER_KV, live, num_seqs, block_rows, QUERIES_PER_KV,
        )  # fmt: skip
        step = tl.num_programs(0) * block_rows
        own = first.to(tl.int64) * step + kv_head * block_rows + place
        latents = o_lat + own * V_WIDTH
        shift, inverse = piece_weights(lse + own, count, step, MAX_PIECES)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in tl.range(0, V_WIDTH, DEPTH, num_stages=STAGES if first_piece is None else 1):
        source = latents[:, None] + (k + depth)[None, :]
        if first_piece is None:
            x = tl.load(source, mask=live[:, None], other=0.0)
        else:
            x = merge_columns(source, lse + own, shift, inverse, count, step, V_WIDTH, STAGES)
        up = tl.load(factor[None, :] + (k + depth)[:, None], mask=wanted[None, :], other=0.0)
        acc = tl.dot(x.to(v_up.dtype.element_ty), up, acc, input_precision="ieee")
    if v_bias is not None:
        bias = tl.load(v_bias + kv_head * HEAD_DIM + column, mask=wanted, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if sinks is not None:
        if first_piece is None:
            logs = lse + token * (tl.num_programs(0) * QUERIES_PER_KV) + head
            log = tl.load(logs, mask=live, other=float("-inf"))
        else:
            log = tl.where(inverse == 0, float("-inf"), shift - tl.log(inverse))
        acc *= shares_beside_sinks(sinks + head, log)[:, None]
    target = out + token[:, None] * stride_out_token + (head * stride_out_head)[:, None]
    tl.store(
        target + column[None, :],
        acc.to(out.dtype.element_ty),
        mask=live[:, None] & wanted[None, :],
    )
