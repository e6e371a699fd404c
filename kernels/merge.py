"""Merge of the splits of one attention call by their log-sum-exp.

Roofline. Pure traffic: ``splits · (w_v + 1)`` float32 elements read and ``w_v + 1`` written per
query row, mostly from L2, where the attention kernel has just put them. Against ``length · rank``
cached elements per sequence this is small as long as a split covers a few hundred tokens.

Data movement. One program per query row and column block; all log-sum-exps of the row are read at
once, then one partial result after the other. A split that saw no token has minus infinity there
and its partial result, which was never written, is not read.
"""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["num_splits", "stride_lse_split"],
    do_not_specialize_on_alignment=["partial_lse", "lse"],
)
def merge_splits(
    partial,
    partial_lse,
    out,
    lse,
    num_splits,
    stride_split,
    stride_lse_split,
    V_WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """``partial: [splits, rows, V_WIDTH]``, ``partial_lse: [splits, rows]``, both float32."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.arange(0, MAX_SPLITS)
    logs = tl.load(
        partial_lse + split * stride_lse_split + row, mask=split < num_splits, other=float("-inf")
    )
    highest = tl.max(logs, axis=0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp(logs - shift), axis=0)
    inverse = tl.where(total == 0, 0.0, 1 / total)  # a NaN stays a NaN
    acc = tl.zeros([COLUMNS], tl.float32)
    source = partial + row * V_WIDTH + column
    for s in tl.range(0, num_splits):
        log = tl.load(partial_lse + s * stride_lse_split + row)
        if log > float("-inf"):
            acc += tl.exp(log - shift) * tl.load(source, mask=column < V_WIDTH, other=0.0)
        source += stride_split
    tl.store(out + row * V_WIDTH + column, acc * inverse, mask=column < V_WIDTH)
    if tl.program_id(1) == 0:
        merged = tl.where(total == 0, float("-inf"), shift + tl.log(total))
        tl.store(lse + row, merged)
