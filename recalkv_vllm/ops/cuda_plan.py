"""Launch parameters of the CUDA decode kernel by shape and device: every tuning choice is here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from recalkv_vllm.ops.layer import LatentLayer

Span = tuple[int, int]

#: V tiles (of 16 columns) of the instantiations by query-row tiles (of 8): see launch_decode.cuh.
INSTANTIATIONS = {1: (4, 8, 16, 32), 2: (4, 8, 16)}
#: The one that reads the factor from L2 instead of shared memory.
STREAMING = (1, 32)
HEAD_DIMS = (64, 96, 128)
#: Warps of a block at most; its registers (255 a thread) are then a multiprocessor's.
LARGEST_BLOCK_WARPS = 8
#: Fewer warps than this cannot keep tensor cores and loads busy.
ENOUGH_WARPS = 4
MOST_STAGES = 3
#: Partial results of more splits cost more to merge than they win.
MOST_SPLITS = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """The device as far as plans depend on it: multiprocessors, shared bytes per block and SM."""

    multiprocessors: int
    shared_bytes: int
    shared_bytes_per_multiprocessor: int


@dataclass(frozen=True, slots=True)
class Layer:
    """Sizes of one layer's attention; spans are those of its KV heads, one per head."""

    head_dim: int
    k_group_size: int
    k_spans: tuple[Span, ...]
    v_spans: tuple[Span, ...]
    key_bias: bool
    key_norm: bool

    @classmethod
    def of(cls, layer: LatentLayer) -> Layer:
        """From the op's constants: one span per group."""
        heads, k_spans, v_spans = layer.num_kv_heads, layer.k_spans, layer.v_spans
        k = tuple(k_spans[head // layer.k_group_size] for head in range(heads))
        v = tuple(v_spans[head * len(v_spans) // heads] for head in range(heads))
        return cls(
            layer.head_dim,
            layer.k_group_size,
            k,
            v,
            layer.k_bias is not None,
            layer.k_norm_weight is not None,
        )

    @property
    def k_width(self) -> int:
        return self.k_spans[0][1] - self.k_spans[0][0]

    @property
    def v_width(self) -> int:
        return self.v_spans[0][1] - self.v_spans[0][0]


@dataclass(frozen=True, slots=True)
class Plan:
    """How the kernel cuts up one layer's work; names as in ``csrc/cuda/params.h``.

    Args:
        blocks: ``(KV heads, V columns)`` blocks per block of query rows.
        blocks_per_multiprocessor: how many run at once on one.
    """

    column_tiles: int
    v_tiles: int
    heads: int
    teams: int
    stages: int
    tile_width: int
    resident: bool
    shared_bytes: int
    blocks: int
    blocks_per_multiprocessor: int

    @property
    def columns(self) -> int:
        """Query rows of a block, under each of its KV heads."""
        return 8 * self.column_tiles

    @property
    def tokens(self) -> int:
        """Cached tokens of a tile."""
        return tile_tokens(self.column_tiles, self.v_tiles)


def tile_tokens(column_tiles: int, v_tiles: int) -> int:
    """Cached tokens of a tile: fewer where the output needs the registers (``shape.cuh``)."""
    return 16 if column_tiles * v_tiles > 16 else 32


def v_blocks(layer: Layer, v_tiles: int) -> list[Span]:
    """Parts of a V span, relative to its start, that blocks own."""
    step = 16 * v_tiles
    return [(a, min(a + step, layer.v_width)) for a in range(0, layer.v_width, step)]


def tile_spans(layer: Layer, first_head: int, heads: int, v_part: Span) -> list[Span]:
    """Disjoint, sorted column spans that a block loads: what K and V share is loaded once."""
    wanted = {layer.k_spans[first_head]}
    for start, _ in layer.v_spans[first_head : first_head + heads]:
        wanted.add((start + v_part[0], start + v_part[1]))
    merged: list[Span] = []
    for start, end in sorted(wanted):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def shared_bytes(layer: Layer, plan_of: tuple[int, int, int, int, int, int, bool]) -> int:
    """Shared memory of a block; mirrors ``SharedLayout`` in ``shape.cuh``, which checks it."""
    column_tiles, v_tiles, heads, teams, stages, tile_width, resident = plan_of
    tokens, columns, dim = tile_tokens(column_tiles, v_tiles), 8 * column_tiles, layer.head_dim
    fixed = heads * dim * layer.k_width * 2 if resident else 0
    fixed += heads * columns * (dim + 8) * 2 + tokens * (dim // 2 + 4) * 8
    fixed += heads * dim * 4 * layer.key_bias + dim * 4 * layer.key_norm
    fixed += -(-tile_width // 32) * 16
    stage = tokens * (tile_width + 8) * 2 + dim * 4
    merge = teams * heads * columns * 8 + heads * columns * (16 * v_tiles + 4) * 4
    return fixed + max(teams * stages * stage, merge)


def candidates(
    layer: Layer, limits: Limits, column_tiles: int, v_tiles: int, resident: bool
) -> Iterator[Plan]:
    """Every way to run one instantiation within the limits."""
    parts = v_blocks(layer, v_tiles)
    all_heads = len(layer.k_spans)
    for heads in range(min(layer.k_group_size, LARGEST_BLOCK_WARPS), 0, -1):
        if layer.k_group_size % heads:
            continue
        width = max(
            sum(end - start for start, end in tile_spans(layer, first, heads, part))
            for first in range(0, all_heads, heads)
            for part in parts
        )
        for teams in range(LARGEST_BLOCK_WARPS // heads, 0, -1):
            for stages in range(MOST_STAGES, 1, -1):
                shape = (column_tiles, v_tiles, heads, teams, stages, width, resident)
                needed = shared_bytes(layer, shape)
                if needed > limits.shared_bytes:
                    continue
                # The driver keeps 1 KiB of each block's shared memory.
                fit = limits.shared_bytes_per_multiprocessor // (needed + 1024)
                at_once = max(1, min(fit, LARGEST_BLOCK_WARPS // (heads * teams)))
                yield Plan(*shape, needed, all_heads // heads * len(parts), at_once)


@cache
def plan(layer: Layer, limits: Limits, column_tiles: int) -> Plan | None:
    """Parameters for blocks of ``8 · column_tiles`` query rows; None if no instantiation fits.

    Most heads per block that leave enough warps (latents are read least often), then the longest
    tiles, most warps and most stages. A factor that does not fit beside a ring of tiles is streamed
    from L2.
    """
    needed = layer.v_width // 16
    v_tiles = INSTANTIATIONS[column_tiles]

    def quality(plan: Plan) -> tuple[int, ...]:
        warps = plan.heads * plan.teams * plan.blocks_per_multiprocessor
        enough = min(warps, ENOUGH_WARPS)
        return (enough, plan.heads, plan.tokens, warps, -plan.v_tiles, plan.stages)

    fitting = [
        candidate
        for tiles in [n for n in v_tiles if n >= needed] or v_tiles[-1:]
        for candidate in candidates(layer, limits, column_tiles, tiles, resident=True)
    ]
    if not fitting and column_tiles == STREAMING[0]:
        fitting = list(candidates(layer, limits, *STREAMING, resident=False))
    return max(fitting, key=quality, default=None)


@cache
def split_count(plan: Plan, limits: Limits, row_blocks: int, max_seq_len: int) -> int:
    """Splits of the cached tokens: fixed by shapes alone, so that a CUDA graph can hold it.

    Minimises waves of blocks times tiles per warp, with two tiles' worth of start-up each.
    """
    slots = limits.multiprocessors * plan.blocks_per_multiprocessor
    most_tiles = -(-max_seq_len // (plan.tokens * plan.teams))

    def cost(splits: int) -> float:
        waves = -(-row_blocks * plan.blocks * splits // slots)
        return waves * (-(-most_tiles // splits) + 2) + 0.01 * splits

    return min(range(1, max(1, min(MOST_SPLITS, most_tiles)) + 1), key=cost)
