"""Inverse root mean squares of keys, of latents that were just written into the paged cache.

Roofline. ``2·w_k·d`` FLOP per new token and KV head, as much as attention spends on one cached
token, and ``w_k`` elements of latents; a decode step reads the factor once, from memory.

Data movement. One program per (tile of new tokens, norm): a KV head, or all heads of a token. It
reads latents back as the cache has them, rounded or quantized, so that keys and norms agree.
Latents and factors are streamed, some columns at a time; keys never leave the accumulator.
"""

import triton
import triton.language as tl

from recalkv_vllm.kernels.keys import reconstruct_streaming
from recalkv_vllm.kernels.latents import Cache, Format, locate_span, tokens_in
from recalkv_vllm.kernels.reconstruction import add_bias


@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=["slot_mapping"])
def write_key_scales(
    slot_mapping,
    kv_cache,
    scales,
    key_scales,
    k_up,
    k_bias,
    first_columns,
    first_codes,
    num_slots,
    stride_block,
    stride_slot,
    stride_scale_block,
    stride_scale_slot,
    stride_key_block,
    stride_key_slot,
    norm_eps,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    K_WIDTH: tl.constexpr,
    K_STREAMS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CODEC: tl.constexpr,
    RANK: tl.constexpr,
    SCALE_SHIFT: tl.constexpr,
    CODE_UNIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write ``key_scales[block, slot, norm]`` of all slots that are not negative.

    A norm is over ``HEADS`` KV heads; factors and bias are those of keys before the norm's weight,
    padded to ``DIM``.
    """
    DTYPE: tl.constexpr = k_up.dtype.element_ty
    FORMAT: tl.constexpr = Format(CODEC, RANK, SCALE_SHIFT, CODE_UNIT, DTYPE)
    norm = tl.program_id(1)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    slot = tl.load(slot_mapping + row, mask=row < num_slots, other=-1).to(tl.int64)
    live = slot >= 0
    slot = tl.maximum(slot, 0)
    cache = Cache(
        None,
        0,
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
    tokens = tokens_in(cache, slot // BLOCK_SIZE, slot, live, BLOCK_SIZE)

    squares = tl.zeros([TILE], tl.float32)
    for j in range(HEADS):
        head = norm * HEADS + j
        start = locate_span(first_columns, first_codes, head * 2)
        keys = add_bias(tl.zeros([TILE, DIM], tl.float32), k_bias, head, DIM)
        factor = k_up + head * DIM * K_WIDTH
        keys = reconstruct_streaming(
            keys, tokens, start, factor, DIM, K_WIDTH, K_STREAMS, STAGES, FORMAT
        )
        squares += tl.sum(keys * keys, axis=1)
    inverse = tl.rsqrt(squares / (HEADS * HEAD_DIM) + norm_eps)
    tl.store(tokens.key_scales + norm, inverse, mask=live)
