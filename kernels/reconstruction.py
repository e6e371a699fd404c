"""Dense keys and values of stretches of the cache, for attention that wants them so.

Roofline. ``2·d·(w_k + w_v)`` FLOP and ``2·d`` elements written per token and KV head: at widths of
64 in bf16 that is 64 FLOP per byte, bound by memory. It is done once per token of the context that
a call attends, where attention on latents reconstructs a key anew for every block of queries.

Data movement. One program per (tile of tokens, KV head); those of a tile are neighbors, so that all
heads of a group but one read its latents from L2. Latents and factors are streamed, some columns at
a time, through one product for keys and one for values. Bias, scale and RoPE are on the
accumulator.
"""

import triton
import triton.language as tl

from recalkv_vllm.kernels.keys import (
    load_rotation,
    reconstruct_streaming,
    rotate_pairs,
    scale_keys,
)
from recalkv_vllm.kernels.latents import Cache, Format, locate_span, locate_tokens
from recalkv_vllm.kernels.partition import find_queries


@triton.jit
def add_bias(sums, bias, head, DIM: tl.constexpr):
    """Add ``bias[head]`` of ``[heads, DIM]``, if there is one, to ``sums: [TILE, DIM]``."""
    if bias is not None:
        sums += tl.load(bias + head * DIM + tl.arange(0, DIM)).to(tl.float32)[None, :]
    return sums


@triton.jit(
    do_not_specialize=["num_pieces", "stride_table"],
    do_not_specialize_on_alignment=["block_table", "positions", "start_loc", "keys", "values"],
)
def reconstruct_tokens(
    kv_cache,
    scales,
    key_scales,
    block_table,
    positions,
    start_loc,
    k_up,
    k_bias,
    v_up,
    v_bias,
    first_columns,
    first_codes,
    head_columns,
    rope_table,
    keys,
    values,
    num_pieces,
    stride_block,
    stride_slot,
    stride_scale_block,
    stride_scale_slot,
    stride_key_block,
    stride_key_slot,
    stride_table,
    stride_rope,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROT_HALF: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    K_STREAMS: tl.constexpr,
    V_STREAMS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CODEC: tl.constexpr,
    RANK: tl.constexpr,
    SCALE_SHIFT: tl.constexpr,
    CODE_UNIT: tl.constexpr,
    KEY_SCALES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write ``keys`` and ``values``, each ``[tokens, NUM_KV_HEADS, HEAD_DIM]``.

    Piece ``i``, of sequence ``i``, starts at ``positions[i]`` and owns the rows ``start_loc[i]`` to
    ``start_loc[i + 1]``. Factors and biases are padded to ``DIM``; those of keys are in the order
    of ``head_columns``, which has a rotated pair's members side by side.
    """
    DTYPE: tl.constexpr = keys.dtype.element_ty
    FORMAT: tl.constexpr = Format(CODEC, RANK, SCALE_SHIFT, CODE_UNIT, DTYPE)
    program = tl.program_id(0)
    head = program % NUM_KV_HEADS
    piece, start, first = find_queries(start_loc, program // NUM_KV_HEADS, num_pieces, TILE, True)
    count = tl.load(start_loc + piece + 1) - start
    if first >= count:
        return
    first_position = tl.load(positions + piece)
    cache = Cache(
        block_table,
        stride_table,
        kv_cache,
        scales,
        stride_block,
        stride_slot,
        stride_scale_block,
        stride_scale_slot,
        key_scales,
        stride_key_block,
        stride_key_slot,
    )
    row = first + tl.arange(0, TILE)
    end = first_position + count
    tokens = locate_tokens(cache, piece, first_position + row, end, BLOCK_SIZE)
    component = tl.arange(0, DIM)
    stored = tokens.live[:, None] & (component < HEAD_DIM)[None, :]
    target = ((start + row).to(tl.int64) * NUM_KV_HEADS + head)[:, None] * HEAD_DIM

    k_start = locate_span(first_columns, first_codes, head * 2)
    sums = add_bias(tl.zeros([TILE, DIM], tl.float32), k_bias, head, DIM)
    factor = k_up + head * DIM * K_WIDTH
    sums = reconstruct_streaming(
        sums, tokens, k_start, factor, DIM, K_WIDTH, K_STREAMS, STAGES, FORMAT
    )
    if key_scales is not None:
        sums = scale_keys(sums, tokens, head, KEY_SCALES)
    if rope_table is not None:
        cos, sin = load_rotation(
            rope_table,
            tokens.position.to(tl.int64),
            tokens.live,
            stride_rope,
            ROT_HALF,
            DIM // 2,
        )
        sums = rotate_pairs(sums, cos, sin)
    columns = tl.load(head_columns + component)
    tl.store(keys + target + columns[None, :], sums.to(DTYPE), mask=stored)

    v_start = locate_span(first_columns, first_codes, head * 2 + 1)
    sums = add_bias(tl.zeros([TILE, DIM], tl.float32), v_bias, head, DIM)
    factor = v_up + head * DIM * V_WIDTH
    sums = reconstruct_streaming(
        sums, tokens, v_start, factor, DIM, V_WIDTH, V_STREAMS, STAGES, FORMAT
    )
    tl.store(values + target + component[None, :], sums.to(DTYPE), mask=stored)
