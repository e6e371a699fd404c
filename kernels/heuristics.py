"""Launch parameters by architecture and shape: every tuning choice of the kernels is here.

The choices follow from two budgets, registers and shared memory. Both are held against what the
compiler reports by ``python -m recalkv_vllm.benchmarks.compile_report``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import torch

from recalkv_vllm.kernels.columns import next_power_of_2, power_of_2_chunks
from recalkv_vllm.kernels.splits import MAX_SPLITS, cheapest_split

#: Largest shared memory of one program, by compute capability.
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10,
                103: 227 << 10, 120: 99 << 10}  # fmt: skip
#: Verification of up to this many queries per sequence is decode; more is prefill.
MAX_DECODE_QUERIES = 16
#: Query rows of one program in prefill: each reconstructed key serves them all.
PREFILL_ROWS = 64


@dataclass(frozen=True, slots=True)
class Target:
    """The device as far as launch parameters depend on it."""

    arch: int
    num_sms: int

    @property
    def shared_bytes(self) -> int:
        return SHARED_BYTES.get(self.arch, 99 << 10)

    @property
    def wide_mma(self) -> bool:
        """Whether matrix operands are read from shared memory (wgmma, tcgen05)."""
        return self.arch // 10 in WIDE


#: Small enough that tests cross every boundary: tiles, splits, query blocks.
INTERPRETER = Target(arch=0, num_sms=2)


@cache
def target_of(device: torch.device) -> Target:
    """Read the target off a device; tensors on the CPU mean the interpreter."""
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return Target(
        10 * major + minor, torch.cuda.get_device_properties(device).multi_processor_count
    )


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What launch parameters of an attention depend on, besides the target and the batch."""

    queries_per_kv: int
    num_kv_heads: int
    k_group_size: int
    heads_per_v: int
    dim: int
    k_width: int
    v_width: int
    itemsize: int
    shared_columns: int
    local_rope: bool
    rope: bool
    key_bias: bool
    key_norm: bool
    code_bits: int | None = None


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Parameters of one launch; names as in ``attention.py``."""

    heads: int
    v_block: int
    query_block: int
    rows: int
    tile: int
    local_rope: bool
    stream: int
    warps: int
    stages: int


def head_counts(shape: AttentionShape) -> Iterator[int]:
    """KV heads a program may own, most first: in one V group, whole K groups or part of one."""
    for heads in range(shape.heads_per_v, 0, -1):
        group = shape.k_group_size
        if shape.heads_per_v % heads == 0 and (heads % group == 0 or group % heads == 0):
            yield heads


def v_blocks(v_width: int, largest: int) -> int:
    """Widest divisor of ``v_width`` that is a multiple of 16 and not above ``largest``."""
    units = v_width // 16
    return 16 * max(n for n in range(1, units + 1) if units % n == 0 and 16 * n <= largest)


@dataclass(frozen=True, slots=True)
class Rule:
    """A way to run the attention kernel, and how far it goes without register spills.

    Args:
        families: architectures it is for, by the first digits of the compute capability.
        stream: factors are streamed from L2, not kept in shared memory.
        factor: largest ``k_width · dim`` of one head, and of several heads together.
        rows: most query rows.
        v_block: most value columns.
        columns: most latent columns of a tile, half as many for several heads.
        ragged: also for widths that :func:`ragged` tells of.
    """

    families: tuple[int, ...]
    tile: int
    warps: int
    local_rope: bool
    stream: bool
    factor: tuple[int, int]
    rows: int
    v_block: int
    columns: int
    ragged: bool


ANY = 1 << 30
EVERY = (8, 9, 10, 12)
WIDE = (9, 10)
#: Best first. Limits were read off compiled kernels (``benchmarks/compile_report.py``). A tile of
#: 64 tokens is what wgmma takes at least; with 32 half the accumulators are live. tcgen05 keeps
#: them in tensor memory, which eight warps read in smaller pieces.
RULES = (
    Rule((9,), 64, 4, True, False, (128 * 128, 128 * 128), 16, 256, 512, True),
    Rule((9,), 64, 4, False, False, (256 * 128, 64 * 128), 16, 256, 512, True),
    Rule((9,), 64, 4, False, False, (64 * 128, 0), 64, 64, 256, False),
    Rule((9,), 64, 4, False, False, (128 * 128, 0), 32, 128, 256, False),
    Rule((10,), 64, 8, True, False, (256 * 128, 128 * 128), 16, 256, 512, True),
    Rule((10,), 64, 8, False, False, (256 * 128, 64 * 128), 16, 256, 512, True),
    Rule((10,), 64, 8, False, False, (128 * 128, 0), 64, 128, 256, True),
    Rule(EVERY, 64, 4, False, False, (128 * 128, 0), 16, 128, 128, True),
    Rule(EVERY, 32, 8, False, False, (256 * 128, 0), 16, 256, 512, True),
    Rule(EVERY, 32, 8, False, False, (512 * 128, 0), 16, 512, 512, False),
    Rule((9,), 32, 8, False, False, (64 * 128, 0), 16, 320, 384, True),
    Rule((10,), 64, 8, True, False, (64 * 128, 0), 16, 320, 384, True),
    Rule((9,), 32, 4, False, False, (128 * 128, 0), 64, 128, 256, False),
    Rule((10,), 32, 4, False, False, (128 * 128, 0), 64, 128, 256, True),
    Rule((9,), 32, 4, False, False, (96 * 128, 0), 32, 48, 144, True),
    Rule((9,), 32, 8, False, False, (128 * 128, 0), 32, 128, 256, True),
    Rule((8, 12), 32, 8, False, False, (128 * 128, 0), 32, 128, 256, True),
    Rule(EVERY, 32, 8, False, True, (ANY, 0), 16, 512, 512, True),
    Rule(WIDE, 32, 4, False, True, (ANY, 0), 64, 64, 128, True),
    Rule((8, 12), 32, 4, False, True, (ANY, 0), 32, 64, 128, True),
)


#: Most latent columns of a quantised tile of 64 tokens where accumulators are in registers.
QUANTISED_COLUMNS = 128


def tile_columns(shape: AttentionShape, config: AttentionConfig) -> int:
    """Latent columns that a program loads per tile and keeps: its V block and its K spans."""
    groups = max(1, config.heads // shape.k_group_size)
    shared = shape.shared_columns if config.v_block == shape.v_width else 0
    return config.v_block + (0 if config.stream else groups * (shape.k_width - shared))


def shared_memory(shape: AttentionShape, config: AttentionConfig, target: Target) -> int:
    """Estimated bytes of shared memory: buffered latents and streams, and what is resident."""
    buffers = (config.stages - 1) // 2 + target.wide_mma
    kept = config.heads * shape.dim * shape.k_width
    buffered = config.tile * tile_columns(shape, config)
    if config.stream:
        kept, buffered = buffered, config.stream * (config.tile + shape.dim)
    if shape.rope and not config.local_rope:
        buffered += config.tile * shape.dim
    operands = (shape.dim + config.tile) * config.rows
    return (buffers * buffered + kept + operands) * shape.itemsize + 2048


def ragged(width: int) -> bool:
    """Whether a width ends in chunks below wgmma's 64: operands of mma.sync are in registers."""
    return width % 64 != 0 and width & (width - 1) != 0


def spill_free(shape: AttentionShape, config: AttentionConfig, rule: Rule) -> bool:
    """Whether the configuration is within what the rule was found to compile well for."""
    several = config.heads > 1
    columns = tile_columns(shape, config)
    if several and shape.key_norm:
        return False  # 40 bytes and more spilled on sm_90
    joint = shape.shared_columns == shape.k_width == shape.v_width
    if several and joint and rule.local_rope and rule.families == (10,):
        return False  # 16 bytes spilled by three heads
    if ragged(shape.k_width) or ragged(config.v_block):
        # A joint span of 48: the products of both spans are mma.sync's, beside wgmma's for scores.
        narrow = rule.local_rope and rule.warps == 4 and columns < 64
        if several or narrow or not rule.ragged:
            return False
        # 8 bytes spilled on sm_80.
        biased = shape.key_bias and rule.families == (8, 12)
        if biased and config.rows > 16 and config.v_block > 64:
            return False
    # Codes and numbers of a tile are live at once; int3 is put together from two planes.
    if shape.code_bits is not None and rule.families != (10,) and not rule.stream:
        if columns > QUANTISED_COLUMNS and rule.tile == 64:
            return False
        if shape.code_bits == 8 and shape.k_width > 64 and rule.local_rope:
            return False  # 16 bytes spilled on sm_90
        if shape.code_bits == 3 and shape.k_width > 64 and rule.tile == 64 and 8 in rule.families:
            return False  # 8 bytes spilled on sm_80
        chunks = power_of_2_chunks(0, shape.k_width)
        if shape.code_bits == 3 and len(chunks) > 1:
            return False
    largest = rule.factor[several] * 2 // shape.itemsize
    return (
        config.heads * shape.k_width * shape.dim <= largest
        and config.rows <= rule.rows
        and config.v_block <= rule.v_block
        and columns * (2 if several else 1) <= rule.columns
    )


def work(shape: AttentionShape, config: AttentionConfig) -> float:
    """FLOP / 2 per token and query row: every block of value columns rebuilds and scores keys.

    A streamed factor is read from L2 once per tile, which at 32 tokens is 32 FLOP per byte: it
    counts as four times the work.
    """
    rows = config.query_block * shape.queries_per_kv
    rebuild = shape.k_width * shape.dim / rows * (4 if config.stream else 1)
    return shape.v_width / config.v_block * (rebuild + shape.dim) + shape.v_width


@cache
def attention_config(shape: AttentionShape, target: Target, queries: int) -> AttentionConfig:
    """Launch parameters for blocks of up to ``queries`` queries per sequence.

    Prefers little work, then many heads per program (latents are read less often), then the order
    of :data:`RULES`; prefetches deeper while two programs still fit on a multiprocessor.
    """
    if target is INTERPRETER:
        heads = next(head_counts(shape))
        v_block = v_blocks(shape.v_width, 256)
        return _config(shape, heads, v_block, queries, PREFILL_ROWS, RULES[0])
    candidates = sorted(_candidates(shape, target, queries), key=lambda each: work(shape, each[0]))
    for config, rule in candidates:
        if (
            spill_free(shape, config, rule)
            and shared_memory(shape, config, target) <= target.shared_bytes
        ):
            deeper = replace(config, stages=5)
            roomy = 2 * shared_memory(shape, deeper, target) <= target.shared_bytes
            # With more rows, heads or chunks the addresses of several tiles would spill.
            light = config.rows == 16 and config.heads == 1 and tile_columns(shape, config) <= 256
            light &= shape.code_bits is None
            light &= config.warps == 8 or not ragged(config.v_block)
            return deeper if roomy and light else config
    raise ValueError(f"no launch parameters for sm_{target.arch} fit {shape}")


def _candidates(
    shape: AttentionShape, target: Target, queries: int
) -> Iterator[tuple[AttentionConfig, Rule]]:
    rules = [
        rule
        for rule in RULES
        if target.arch // 10 in rule.families and rule.local_rope <= shape.local_rope
    ]
    blocks = dict.fromkeys(v_blocks(shape.v_width, n) for n in (512, 256, 128, 64, 32, 16))
    for rows, v_block, heads, rule in product(
        (PREFILL_ROWS, 32, 16), blocks, head_counts(shape), rules
    ):
        yield _config(shape, heads, v_block, queries, rows, rule), rule


def _config(shape: AttentionShape, heads: int, v_block: int, queries: int, most_rows: int,
            rule: Rule) -> AttentionConfig:  # fmt: skip
    per_query = heads * shape.queries_per_kv
    query_block = max(1, min(queries, most_rows // per_query))
    rows = max(16, next_power_of_2(query_block * per_query))
    stream = min(64, shape.k_width & -shape.k_width) if rule.stream else 0
    local_rope = rule.local_rope and shape.local_rope
    # Twice the registers, for the codes, scales and numbers of a tile while it is dequantised.
    warps = rule.warps if shape.code_bits is None else 8
    return AttentionConfig(
        heads, v_block, query_block, rows, rule.tile, local_rope, stream, warps, stages=3
    )


def most_programs(target: Target) -> int:
    """Programs times splits at most: four waves of two programs per multiprocessor."""
    return 8 * target.num_sms


@cache
def split_count(programs: int, max_tiles: int, target: Target) -> int:
    """Splits of the cached tokens: fixed by shapes alone, so that a graph can hold it.

    The bound on programs bounds the workspace too.
    """
    most = max(1, min(MAX_SPLITS, max_tiles, most_programs(target) // programs))
    return cheapest_split(programs, 2 * target.num_sms, max_tiles, most)


@dataclass(frozen=True, slots=True)
class ValueUpConfig:
    """Parameters of ``value_up.py``: a block of the product is ``rows · columns · depth``."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@cache
def value_up_config(rows: int, head_dim: int, v_width: int) -> ValueUpConfig:
    """Blocks for ``rows`` query rows per KV head; few rows want many programs over columns."""
    depth = min(64, v_width & -v_width)  # the largest power of two that divides the width
    many = rows > 64
    columns = min(64 if many else 32, next_power_of_2(head_dim))
    block_rows = 64 if many else max(16, next_power_of_2(rows))
    return ValueUpConfig(block_rows, columns, depth, warps=4, stages=3)
