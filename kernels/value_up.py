"""Value up-projection: from per-head value latents to head outputs.

Roofline. ``2·d·w_v`` FLOP per query row against ``h_kv·d·w_v`` elements of ``v_up`` read once per
call: with few rows (decode) bound by reading the factor from L2 or memory, with many by the tensor
cores, like any linear layer.

Data movement. One program per (KV head, block of query rows, block of output columns); the query
heads that share a KV head are rows of one product, so the factor is read once for all of them.
Latents come in float32 and are rounded to the factor's dtype on chip.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def project_values(
    o_lat,
    v_up,
    v_bias,
    out,
    tokens,
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
    STAGES: tl.constexpr,
):
    """``out[t, h] = v_up[h // QUERIES_PER_KV] @ o_lat[t, h] (+ v_bias)``; DEPTH divides V_WIDTH."""
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
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, V_WIDTH, DEPTH, num_stages=STAGES):
        x = tl.load(latents[:, None] + (first + depth)[None, :], mask=live[:, None], other=0.0)
        up = tl.load(factor[None, :] + (first + depth)[:, None], mask=wanted[None, :], other=0.0)
        acc = tl.dot(x.to(v_up.dtype.element_ty), up, acc, input_precision="ieee")
    if v_bias is not None:
        bias = tl.load(v_bias + kv_head * HEAD_DIM + column, mask=wanted, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    target = out + token[:, None] * stride_out_token + (head * stride_out_head)[:, None]
    tl.store(
        target + column[None, :],
        acc.to(out.dtype.element_ty),
        mask=live[:, None] & wanted[None, :],
    )
