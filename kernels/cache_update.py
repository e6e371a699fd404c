"""Paged write of new latents.

Roofline. Pure traffic: ``2 · rank`` elements per new token (one read, one write); a decode step
moves a few kilobytes and costs a launch.

Data movement. One program per (token, block of columns), a straight copy with conversion to the
cache's dtype. Rows of the cache may lie at any distance (several layers can share one storage), so
both strides are arguments and the product with the block number is taken in 64 bits.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize_on_alignment=["slot_mapping"])
def write_latents(
    z,
    kv_cache,
    slot_mapping,
    stride_z,
    stride_block,
    stride_slot,
    RANK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Copy ``z[token]`` to slot ``slot_mapping[token]``; a negative slot is padding."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot < 0:
        return
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = column < RANK
    value = tl.load(z + token * stride_z + column, mask=live)
    target = kv_cache + slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_slot
    tl.store(target + column, value.to(kv_cache.dtype.element_ty), mask=live)
