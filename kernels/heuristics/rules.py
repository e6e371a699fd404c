"""How far each way to run the attention kernel goes without register spills.

Limits were read off compiled kernels (``python -m recalkv_vllm.benchmarks.compile_report``).
"""

from __future__ import annotations

from dataclasses import dataclass

from recalkv_vllm.kernels.columns import power_of_2_chunks
from recalkv_vllm.kernels.heuristics.shapes import AttentionConfig, AttentionShape, tile_columns
from recalkv_vllm.kernels.heuristics.targets import (
    BLACKWELL,
    EVERY,
    HOPPER,
    NARROW_MMA,
    WIDE_MMA,
    Target,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A way to run the attention kernel, and its limits.

    Args:
        families: architectures it is for, by the first digits of the compute capability.
        tile: cached tokens per step.
        local_rope: keys are turned by their offset in the tile.
        stream: factors are streamed from L2, not kept in shared memory.
        factor: largest factor of one head, ``k_width · dim`` elements of 16 bits.
        factors: largest factors of several heads together; 0 if a program has one head.
        rows: most query rows.
        v_block: most value columns.
        columns: most latent columns of a tile, half as many for several heads.
        ragged: also for widths that :func:`ragged` tells of.
    """

    families: tuple[int, ...]
    tile: int
    warps: int
    local_rope: bool = False
    stream: bool = False
    factor: int
    factors: int = 0
    rows: int
    v_block: int
    columns: int
    ragged: bool


UNLIMITED = 1 << 30
#: Best first. A tile of 64 tokens is what wgmma takes at least; with 32 half the accumulators are
#: live. tcgen05 keeps them in tensor memory, which eight warps read in smaller pieces.
# fmt: off
RULES = (
    Rule(families=HOPPER, tile=64, warps=4, local_rope=True,
         factor=128 * 128, factors=128 * 128, rows=16, v_block=256, columns=320, ragged=True),
    Rule(families=HOPPER, tile=64, warps=4,
         factor=256 * 128, factors=64 * 128, rows=16, v_block=256, columns=512, ragged=True),
    Rule(families=HOPPER, tile=64, warps=4,
         factor=64 * 128, rows=64, v_block=64, columns=256, ragged=False),
    Rule(families=HOPPER, tile=64, warps=4,
         factor=128 * 128, rows=32, v_block=128, columns=256, ragged=False),
    Rule(families=BLACKWELL, tile=64, warps=8, local_rope=True,
         factor=256 * 128, factors=128 * 128, rows=16, v_block=256, columns=512, ragged=True),
    Rule(families=BLACKWELL, tile=64, warps=8,
         factor=256 * 128, factors=64 * 128, rows=16, v_block=256, columns=512, ragged=True),
    Rule(families=BLACKWELL, tile=64, warps=8,
         factor=128 * 128, rows=64, v_block=128, columns=256, ragged=True),
    Rule(families=EVERY, tile=64, warps=4,
         factor=128 * 128, rows=16, v_block=128, columns=128, ragged=True),
    Rule(families=EVERY, tile=32, warps=8,
         factor=256 * 128, rows=16, v_block=256, columns=512, ragged=True),
    Rule(families=EVERY, tile=32, warps=8,
         factor=512 * 128, rows=16, v_block=512, columns=512, ragged=False),
    Rule(families=HOPPER, tile=32, warps=8,
         factor=64 * 128, rows=16, v_block=320, columns=384, ragged=True),
    Rule(families=BLACKWELL, tile=64, warps=8, local_rope=True,
         factor=64 * 128, rows=16, v_block=320, columns=384, ragged=True),
    Rule(families=HOPPER, tile=32, warps=4,
         factor=128 * 128, rows=64, v_block=128, columns=256, ragged=False),
    Rule(families=BLACKWELL, tile=32, warps=4,
         factor=128 * 128, rows=64, v_block=128, columns=256, ragged=True),
    Rule(families=HOPPER, tile=32, warps=4,
         factor=96 * 128, rows=32, v_block=48, columns=144, ragged=True),
    Rule(families=HOPPER, tile=32, warps=8,
         factor=128 * 128, rows=32, v_block=128, columns=256, ragged=True),
    Rule(families=NARROW_MMA, tile=32, warps=8,
         factor=128 * 128, rows=32, v_block=128, columns=256, ragged=True),
    Rule(families=EVERY, tile=32, warps=8, stream=True,
         factor=UNLIMITED, rows=16, v_block=512, columns=512, ragged=True),
    Rule(families=WIDE_MMA, tile=32, warps=4, stream=True,
         factor=UNLIMITED, rows=64, v_block=64, columns=128, ragged=True),
    Rule(families=NARROW_MMA, tile=32, warps=4, stream=True,
         factor=UNLIMITED, rows=32, v_block=64, columns=128, ragged=True),
)
# fmt: on
#: Most latent columns of a quantized tile of 64 tokens where accumulators are in registers.
QUANTIZED_COLUMNS = 128
#: Widest resident keys of so many bits, for several queries of a sequence, where operands are in
#: registers: on sm_80, 8 to 48 bytes spilled with 128 columns of int3, 8 with 192 of int8 or fp8.
CODED_KEYS = {3: 64, 8: 128}
#: Most latent columns of any tile in bands: with 512, 80 to 672 bytes spilled.
BAND_COLUMNS = 384


def ragged(width: int) -> bool:
    """Whether a width ends in chunks below wgmma's 64: operands of mma.sync are in registers."""
    return width % 64 != 0 and width & (width - 1) != 0


def spill_free(shape: AttentionShape, config: AttentionConfig, rule: Rule, target: Target) -> bool:
    """Whether a configuration is within what its rule was found to compile well for."""
    return (
        _within_limits(shape, config, rule)
        and _fits_several_heads(shape, config, rule)
        and _fits_ragged_widths(shape, config, rule)
        and _fits_quantized_latents(shape, config, rule, target)
        and (rule.families != HOPPER or _fits_hopper(shape, config, rule))
        and _fits_wide_values(shape, config, target)
    )


def _within_limits(shape: AttentionShape, config: AttentionConfig, rule: Rule) -> bool:
    several = config.heads > 1
    largest = (rule.factors if several else rule.factor) * 2 // shape.itemsize
    return (
        config.heads * shape.k_width * shape.dim <= largest
        and config.rows <= rule.rows
        and config.v_block <= rule.v_block
        and tile_columns(shape, config) * (2 if several else 1) <= rule.columns
    )


def _fits_several_heads(shape: AttentionShape, config: AttentionConfig, rule: Rule) -> bool:
    if config.heads == 1:
        return True
    if shape.key_norm:
        return False  # 40 bytes and more spilled on sm_90
    joint = shape.shared_columns == shape.k_width == shape.v_width
    # 16 bytes spilled by three heads.
    return not (joint and rule.local_rope and rule.families == BLACKWELL)


def _fits_ragged_widths(shape: AttentionShape, config: AttentionConfig, rule: Rule) -> bool:
    if not ragged(shape.k_width) and not ragged(config.v_block):
        return True
    # A joint span of 48: the products of both spans are mma.sync's, beside wgmma's for scores.
    narrow = rule.local_rope and rule.warps == 4 and tile_columns(shape, config) < 64
    if config.heads > 1 or narrow or not rule.ragged:
        return False
    # 8 bytes spilled on sm_80.
    biased = shape.key_bias and rule.families == NARROW_MMA
    return not (biased and config.rows > 16 and config.v_block > 64)


def _fits_hopper(shape: AttentionShape, config: AttentionConfig, rule: Rule) -> bool:
    """Where the tile-local rotation costs 8 to 88 bytes with the ptxas of Triton 3.7 or 3.9."""
    if not rule.local_rope:
        return True
    joint = shape.shared_columns == shape.k_width == config.v_block
    if joint and ragged(config.v_block) and shape.k_width * shape.dim >= 96 * 128:
        return False
    if joint and shape.code_bits is not None and shape.k_width > 64:
        return False
    # Keys that end within wgmma's 64 columns, the chunks of which are not V's.
    if _nested(shape, config) and ragged(shape.k_width) and shape.code_bits is None:
        return False
    uneven = ragged(shape.k_width) and ragged(config.v_block)
    return not shape.key_norm or (tile_columns(shape, config) <= 256 and not uneven)


def _fits_wide_values(shape: AttentionShape, config: AttentionConfig, target: Target) -> bool:
    """Keys within so wide values cost 8 to 24 bytes on sm_80, and beside a bias 16 on sm_100."""
    tight = target.family in NARROW_MMA or (target.family in BLACKWELL and shape.key_bias)
    within = tight and _nested(shape, config) and shape.code_bits is None
    return not within or config.v_block <= 256


def _nested(shape: AttentionShape, config: AttentionConfig) -> bool:
    """Whether keys read the first of a program's value columns, and not all of them."""
    return 0 < shape.shared_columns == shape.k_width < config.v_block


def _fits_quantized_latents(
    shape: AttentionShape, config: AttentionConfig, rule: Rule, target: Target
) -> bool:
    """Codes and elements of a tile are live at once; int3 is put together from two planes."""
    if shape.code_bits is None or rule.stream:
        return True
    uneven = ragged(shape.k_width) or ragged(config.v_block)
    if config.rows > 16 and uneven:
        return False  # 32 to 56 bytes spilled on sm_90, 8 on sm_100
    if rule.families == BLACKWELL:
        # 24 to 232 bytes spilled.
        return not (shape.bands and config.rows > 16 and shape.k_width > 64)
    if shape.bands and not _fits_bands(shape, config, rule):
        return False
    widest = UNLIMITED if shape.bands else CODED_KEYS.get(shape.code_bits, UNLIMITED)
    if target.family in NARROW_MMA and config.query_block > 1 and shape.k_width > widest:
        return False
    if rule.tile == 64 and tile_columns(shape, config) > QUANTIZED_COLUMNS:
        return False
    if shape.code_bits == 8 and shape.k_width > 64 and rule.local_rope:
        return False  # 16 bytes spilled on sm_90
    if shape.code_bits == 3 and shape.k_width > 64 and rule.tile == 64 and 8 in rule.families:
        return False  # 8 bytes spilled on sm_80
    one_chunk = len(power_of_2_chunks(0, shape.k_width)) == 1
    return shape.code_bits != 3 or shape.bands or one_chunk


def _fits_bands(shape: AttentionShape, config: AttentionConfig, rule: Rule) -> bool:
    """A chunk is a load for every plane, each with addresses in registers."""
    if tile_columns(shape, config) > BAND_COLUMNS:
        return False
    # 16 to 136 bytes spilled on sm_90.
    return rule.tile == 32 or not (shape.key_bias or shape.key_norm or shape.code_bits == 8)
