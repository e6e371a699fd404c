"""Value up-projection: from per-head value latents, or partial results of them, to head outputs.

Roofline. ``2·d·w_v`` FLOP per query row against ``h_kv·d·w_v`` elements of ``v_up`` read once per
call: with few rows (decode) bound by reading the factor from L2 or memory, with many by the tensor
cores, like any linear layer.

Data movement. One program per (KV head, block of query rows, block of output columns); the query
heads that share a KV head are rows of one product, so the factor is read once for all of them.
Latents are rounded to the factor's dtype on chip, unless they come in it. Partial results of a call
that was split over cached tokens are merged on the way in, by their log-sum-exp: merging needs
neither a launch nor a trip through memory of its own.
"""

import triton
import triton.language as tl


@triton.jit
def split_weights(
    partial_lse, live, num_splits, stride_lse_split, ROWS: tl.constexpr, MAX_SPLITS: tl.constexpr
):
    """``(shift, inverse)``, each ``[ROWS]``: a split of log-sum-exp ``l`` weighs ``exp(l - shift) ·
    inverse``. ``partial_lse: [ROWS]`` points at the rows' first split."""
    split = tl.arange(0, MAX_SPLITS)
    logs = tl.load(
        partial_lse[:, None] + (split * stride_lse_split)[None, :],
        mask=live[:, None] & (split < num_splits)[None, :],
        other=float("-inf"),
    )
    highest = tl.max(logs, axis=1)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp(logs - shift[:, None]), axis=1)
    return shift, tl.where(total == 0, 0.0, 1 / total)  # a NaN stays a NaN


@triton.jit
def shares_beside_sinks(sinks, shift, inverse):
    """``[ROWS]``: a row's sum of weights over the same with its sink, to which ``sinks`` points."""
    sink = tl.load(sinks).to(tl.float32)
    # Without tokens all is the sink's.
    return tl.where(inverse == 0, 0.0, 1 / (1 + tl.exp(sink - shift) * inverse))


@triton.jit
def merge_columns(
    source, partial_lse, live, shift, inverse, num_splits, stride_split, stride_lse_split,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The splits' weighted sum of the columns at ``source: [ROWS, DEPTH]``, where row lives.

    A split that saw no token was never written: it is read, so that loads need not wait for its
    log-sum-exp, and dropped.
    """
    merged = tl.zeros(source.shape, tl.float32)
    for _ in tl.range(0, num_splits, num_stages=STAGES):
        log = tl.load(partial_lse, mask=live, other=float("-inf"))
        part = tl.load(source, mask=live[:, None], other=0.0)
        weight = tl.exp(log - shift) * inverse
        merged += tl.where((log == float("-inf"))[:, None], 0.0, weight[:, None] * part)
        partial_lse += stride_lse_split
        source += stride_split
    return merged


@triton.jit(
    do_not_specialize=["tokens", "num_splits", "stride_lse_split"],
    do_not_specialize_on_alignment=["partial_lse"],
)
def project_values(
    o_lat,
    partial_lse,
    v_up,
    v_bias,
    sinks,
    out,
    tokens,
    num_splits,
    stride_split,
    stride_lse_split,
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
    MAX_SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``out[t, h] = v_up[h // QUERIES_PER_KV] @ o_lat[t, h] (+ v_bias)``; DEPTH divides V_WIDTH.

    With ``partial_lse: [num_splits, tokens, heads]``, ``o_lat`` is the first of as many partial
    results, ``stride_split`` apart. ``sinks: [heads]`` take their shares of the outputs by it.
    """
    kv_head = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = (row // QUERIES_PER_KV).to(tl.int64)
    head = kv_head * QUERIES_PER_KV + row % QUERIES_PER_KV
    live = token < tokens
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    wanted = column < HEAD_DIM
    depth = tl.arange(0, DEPTH)
    latents = o_lat + token * stride_token + head * stride_head
    factor = v_up + (kv_head * HEAD_DIM + column) * V_WIDTH
    if partial_lse is not None:
        logs = partial_lse + token * (tl.num_programs(0) * QUERIES_PER_KV) + head
        shift, inverse = split_weights(logs, live, num_splits, stride_lse_split, ROWS, MAX_SPLITS)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, V_WIDTH, DEPTH, num_stages=STAGES if partial_lse is None else 1):
        source = latents[:, None] + (first + depth)[None, :]
        if partial_lse is None:
            x = tl.load(source, mask=live[:, None], other=0.0)
        else:
            x = merge_columns(
                source, logs, live, shift, inverse, num_splits, stride_split, stride_lse_split,
                STAGES,
            )  # fmt: skip
        up = tl.load(factor[None, :] + (first + depth)[:, None], mask=wanted[None, :], other=0.0)
        acc = tl.dot(x.to(v_up.dtype.element_ty), up, acc, input_precision="ieee")
    if v_bias is not None:
        bias = tl.load(v_bias + kv_head * HEAD_DIM + column, mask=wanted, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if sinks is not None:
        acc *= shares_beside_sinks(sinks + head, shift, inverse)[:, None]
    target = out + token[:, None] * stride_out_token + (head * stride_out_head)[:, None]
    tl.store(
        target + column[None, :],
        acc.to(out.dtype.element_ty),
        mask=live[:, None] & wanted[None, :],
    )
