"""Paged write of new latents in bands (``recalkv_vllm/band_format.py``).

Roofline and data movement are those of ``quantize.py``. One program per (token, chunk of a band):
what a chunk's codes are packed into is known at compile time, and which chunk a program has is one
branch.
"""

import triton
import triton.language as tl

from recalkv_vllm.kernels.quantize import largest_magnitudes, store_plane


@triton.jit
def scale_bytes(scales):
    """Scales as the upper bytes of halves, rounded up; see ``band_format.encode_scales``."""
    bits = scales.to(tl.int32, bitcast=True)
    normal = tl.minimum(tl.maximum(((bits + 0xFFFFF) >> 20) - (112 << 3), 0), 0xF7)
    subnormal = tl.ceil(scales * 131072).to(tl.int32)  # in units of 2**-17
    codes = tl.where(scales < 6.103515625e-05, subnormal, normal)  # 2**-14
    codes = tl.where(scales == float("inf"), 0xF8, codes)
    return tl.where(scales != scales, 0xFF, codes)


@triton.jit
def write_chunk(
    z, codes, scales, CHUNKS: tl.constexpr, C: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """Quantize the columns of chunk ``C``; pointers are to a token's first ones."""
    OFFSET: tl.constexpr = CHUNKS[C][0]
    SIZE: tl.constexpr = CHUNKS[C][1]
    LOW: tl.constexpr = CHUNKS[C][2]
    HIGH: tl.constexpr = CHUNKS[C][4]
    BLOCKS: tl.constexpr = SIZE // BLOCK_COLUMNS
    HALF: tl.constexpr = 1 << (LOW + HIGH - 1)
    elements = tl.load(z + OFFSET + tl.arange(0, SIZE)).to(tl.float32)
    blocks = tl.reshape(elements, [BLOCKS, BLOCK_COLUMNS])
    encoded = scale_bytes(largest_magnitudes(blocks) * (1.0 / HALF))
    tl.store(scales + OFFSET // BLOCK_COLUMNS + tl.arange(0, BLOCKS), encoded.to(tl.uint8))
    scale = (encoded << 7).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    inverse = tl.where(scale == 0, 0.0, tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), scale))
    units = tl.clamp(tl.floor(blocks * inverse[:, None]) + HALF, 0.0, 2.0 * HALF - 1)
    units = tl.reshape(units.to(tl.int32), [SIZE])
    store_plane(codes + CHUNKS[C][3], units, 0, 0, LOW, SIZE, SIZE)
    if HIGH > 0:
        store_plane(codes + CHUNKS[C][5], units, 0, LOW, HIGH, SIZE, SIZE)


@triton.jit(do_not_specialize_on_alignment=["slot_mapping"])
def write_latents_in_bands(
    z,
    codes,
    scales,
    slot_mapping,
    stride_z,
    stride_block,
    stride_slot,
    stride_scale_block,
    stride_scale_slot,
    CHUNKS: tl.constexpr,
    CODE_BYTES: tl.constexpr,
    USED_BYTES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Quantize ``z[token]`` into slot ``slot_mapping[token]``; a negative slot is padding.

    ``CHUNKS`` are ``(offset, size, *planes)``, see ``columns.py``. Of a token's ``CODE_BYTES``
    those from ``USED_BYTES`` on, fewer than 16, are zero.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot < 0:
        return
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    row = z + token * stride_z
    code_row = codes + block * stride_block + offset * stride_slot
    scale_row = scales + block * stride_scale_block + offset * stride_scale_slot
    chunk = tl.program_id(1)
    for c in tl.static_range(len(CHUNKS)):
        if chunk == c:
            write_chunk(row, code_row, scale_row, CHUNKS, c, BLOCK_COLUMNS)
    if chunk == 0:
        byte = USED_BYTES + tl.arange(0, 16)
        tl.store(code_row + byte, tl.zeros([16], tl.uint8), mask=byte < CODE_BYTES)
