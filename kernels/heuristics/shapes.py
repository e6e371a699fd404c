"""What launch parameters depend on, what they are, and the memory that they take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from recalkv_vllm.kernels.heuristics.targets import WIDE_MMA, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """What launch parameters of an attention depend on, besides the target and the batch.

    Args:
        queries_per_kv: query heads per KV head.
        k_group_size: KV heads per K group.
        heads_per_v: KV heads per V group.
        dim: head size, padded to a power of two.
        itemsize: bytes of an element of factors and queries.
        shared_columns: columns of a K span that its V span has too, lying alike for all heads.
        local_rope: whether the rotation composes, so that keys can be turned by their offset in
            a tile.
        rope: whether there is a rotation at all.
        code_bits: bits of a quantized element, at most; None if latents are not quantized.
        bands: whether latents are in bands.
    """

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
    bands: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    """Parameters of one launch; names as in ``attention.py``.

    Args:
        heads: KV heads per program.
        v_block: value columns per program.
        query_block: queries of one sequence per program.
        rows: query rows, ``query_block · heads · queries_per_kv`` padded to a power of two.
        tile: cached tokens per step.
        local_rope: keys are turned by their offset in the tile.
        stream: columns of a factor read at a time; 0 keeps it in shared memory.
        late_values: values are loaded after keys are reconstructed, from a streamed factor.
    """

    heads: int
    v_block: int
    query_block: int
    rows: int
    tile: int
    local_rope: bool
    stream: int
    late_values: bool
    warps: int
    stages: int


def head_counts(shape: AttentionShape) -> Iterator[int]:
    """KV heads a program may own, most first: in one V group, whole K groups or part of one."""
    for heads in range(shape.heads_per_v, 0, -1):
        group = shape.k_group_size
        if shape.heads_per_v % heads == 0 and (heads % group == 0 or group % heads == 0):
            yield heads


def value_block(v_width: int, largest: int) -> int:
    """Widest divisor of ``v_width`` that is a multiple of 16 and not above ``largest``."""
    units = v_width // 16
    return 16 * max(n for n in range(1, units + 1) if units % n == 0 and 16 * n <= largest)


def streamed_columns(shape: AttentionShape) -> int:
    """Columns of a streamed factor that are read at a time."""
    widest = 32 if shape.bands else 64  # 24 and 48 bytes of addresses spilled with 64
    return min(widest, shape.k_width & -shape.k_width)


def tile_columns(shape: AttentionShape, config: AttentionConfig) -> int:
    """Latent columns that a program loads per tile and keeps: its V block and its K spans."""
    groups = max(1, config.heads // shape.k_group_size)
    shared = shape.shared_columns if config.v_block == shape.v_width else 0
    return config.v_block + (0 if config.stream else groups * (shape.k_width - shared))


def shared_memory(shape: AttentionShape, config: AttentionConfig, target: Target) -> int:
    """Estimated bytes of shared memory: buffered latents and streams, and what is resident."""
    buffers = (config.stages - 1) // 2 + (target.family in WIDE_MMA)
    kept = config.heads * shape.dim * shape.k_width
    buffered = config.tile * tile_columns(shape, config)
    if config.stream:
        kept, buffered = buffered, config.stream * (config.tile + shape.dim)
    if shape.rope and not config.local_rope:
        buffered += config.tile * shape.dim
    operands = (shape.dim + config.tile) * config.rows
    return (buffers * buffered + kept + operands) * shape.itemsize + 2048
