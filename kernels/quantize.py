"""Paged write of new latents as codes and scales (``recalkv_vllm/latent_format.py``).

Roofline. Pure traffic, less than the unquantized write: ``rank`` elements read and ``slot_bytes``
written per new token; a decode step moves a few kilobytes and costs a launch.

Data movement. One program per (token, a few whole groups). Elements stay in registers from the read
to the packed byte; neighboring codes of a byte are added up after shifting, which crosses threads
only for int3's plane of high bits.
"""

import triton
import triton.language as tl


@triton.jit
def largest_magnitudes(x):
    """Of every row; NaN where a row has one (``tl.max`` passes it over)."""
    largest = tl.max(tl.abs(x), axis=1)
    broken = tl.max((x != x).to(tl.int32), axis=1)
    return tl.where(broken > 0, float("nan"), largest)


@triton.jit
def fp8_codes(scaled):
    """e4m3 of elements up to 448, rounded to nearest even; integer arithmetic, for sm_80 has none.

    Below 2**-6 codes count multiples of 2**-9: so does the mantissa of the number plus 2**14.
    """
    bits = scaled.to(tl.int32, bitcast=True)
    size = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)  # 448
    normal = (size + 0x7FFFF + ((size >> 20) & 1) - (120 << 23)) >> 20
    magic: tl.constexpr = 2.0**14
    subnormal = (size.to(tl.float32, bitcast=True) + magic).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(size < 0x3C800000, subnormal, normal) | ((bits >> 24) & 0x80)


@triton.jit
def pack_codes(codes, FROM: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """``WIDTH`` bits from bit ``FROM`` on of ``SIZE`` codes, earlier codes in lower bits."""
    PER_BYTE: tl.constexpr = 8 // WIDTH
    part = tl.reshape((codes >> FROM) & ((1 << WIDTH) - 1), [SIZE // PER_BYTE, PER_BYTE])
    return tl.sum(part << (WIDTH * tl.arange(0, PER_BYTE))[None, :], axis=1)


@triton.jit
def store_plane(
    target, codes, first, FROM: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """Pack columns ``first + [0, SIZE)`` and store those below ``RANK``."""
    PER_BYTE: tl.constexpr = 8 // WIDTH
    byte = first // PER_BYTE + tl.arange(0, SIZE // PER_BYTE)
    packed = pack_codes(codes, FROM, WIDTH, SIZE).to(tl.uint8)
    tl.store(target + byte, packed, mask=byte < RANK // PER_BYTE)


@triton.jit(do_not_specialize_on_alignment=["slot_mapping"])
def write_quantized_latents(
    z,
    codes,
    scales,
    slot_mapping,
    stride_z,
    stride_block,
    stride_slot,
    stride_scale_block,
    stride_scale_slot,
    RANK: tl.constexpr,
    CODEC: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PER_PROGRAM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Quantize ``z[token]`` into slot ``slot_mapping[token]``; a negative slot is padding."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot < 0:
        return
    SIZE: tl.constexpr = GROUPS_PER_PROGRAM * GROUP
    group = tl.program_id(1) * GROUPS_PER_PROGRAM + tl.arange(0, GROUPS_PER_PROGRAM)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    elements = tl.load(z + token * stride_z + column, mask=column < RANK, other=0.0).to(tl.float32)
    HALF: tl.constexpr = 128 if CODEC == "int8" else 8 if CODEC == "int4" else 4
    STEPS: tl.constexpr = 448.0 if CODEC == "fp8" else 1.0 * HALF
    rounded = tl.div_rn(
        largest_magnitudes(elements), tl.full([GROUPS_PER_PROGRAM], STEPS, tl.float32)
    )
    rounded = rounded.to(tl.bfloat16)
    scale = rounded.to(tl.float32)
    scale = tl.where(scale < 1.1754943508222875e-38, 0.0, scale)  # smallest normal number
    inverse = tl.where(
        scale == 0, 0.0, tl.div_rn(tl.full([GROUPS_PER_PROGRAM], 1.0, tl.float32), scale)
    )
    scaled = elements * inverse[:, None]
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    scale_row = scales + block * stride_scale_block + offset * stride_scale_slot
    tl.store(scale_row + group, scale.to(tl.bfloat16), mask=group < GROUPS)
    if CODEC == "fp8":
        units = fp8_codes(scaled)
    else:
        units = tl.clamp(tl.floor(scaled) + HALF, 0.0, 2.0 * HALF - 1).to(tl.int32)
    units = tl.reshape(units, [SIZE])
    target = codes + block * stride_block + offset * stride_slot
    first = tl.program_id(1) * SIZE
    if CODEC == "int4":
        store_plane(target, units, first, 0, 4, SIZE, RANK)
    elif CODEC == "int3":
        store_plane(target, units, first, 0, 2, SIZE, RANK)
        store_plane(target + RANK // 4, units, first, 2, 1, SIZE, RANK)
    else:
        store_plane(target, units, first, 0, 8, SIZE, RANK)
