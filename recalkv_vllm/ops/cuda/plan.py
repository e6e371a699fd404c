"""Launch parameters of the CUDA decode kernel by shape and device: every tuning choice is here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import cache

from recalkv_vllm.kernels.pieces import Bounds, piece_bounds
from recalkv_vllm.ops.cuda.shapes import BlockShape, LayerShape, Limits, Plan
from recalkv_vllm.span import Span

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
#: More queries per sequence than this, on average, are prefill.
MAX_QUERIES = 16


def v_blocks(layer: LayerShape, v_tiles: int) -> list[Span]:
    """Parts of a V span, relative to its start, that blocks own."""
    step = 16 * v_tiles
    return [Span(a, min(a + step, layer.v_width)) for a in range(0, layer.v_width, step)]


def tile_spans(layer: LayerShape, first_head: int, heads: int, v_part: Span) -> list[Span]:
    """Disjoint, sorted column spans that a block loads: what K and V share is loaded once."""
    wanted = {layer.k_spans[first_head]}
    for span in layer.v_spans[first_head : first_head + heads]:
        wanted.add(Span(span.start + v_part.start, span.start + v_part.end))
    merged: list[Span] = []
    for span in sorted(wanted):
        if merged and span.start <= merged[-1].end:
            merged[-1] = Span(merged[-1].start, max(span.end, merged[-1].end))
        else:
            merged.append(span)
    return merged


def shared_bytes(layer: LayerShape, block: BlockShape) -> int:
    """Shared memory of a block; mirrors ``SharedLayout`` in ``shape.cuh``, which checks it."""
    heads, tokens, columns, dim = block.heads, block.tokens, block.columns, layer.head_dim
    fixed = heads * dim * layer.k_width * 2 if block.resident else 0
    fixed += heads * columns * (dim + 8) * 2 + tokens * (dim // 2 + 4) * 8
    fixed += heads * dim * 4 * layer.key_bias
    fixed += -(-block.tile_width // 32) * 16
    stage = tokens * (block.tile_width + 8) * 2 + dim * 4
    merge = block.teams * heads * columns * 8 + heads * columns * (16 * block.v_tiles + 4) * 4
    return fixed + max(block.teams * block.stages * stage, merge)


def candidates(
    layer: LayerShape, limits: Limits, column_tiles: int, v_tiles: int, resident: bool
) -> Iterator[Plan]:
    """Every way to run one instantiation within the limits."""
    parts = v_blocks(layer, v_tiles)
    all_heads = len(layer.k_spans)
    for heads in range(min(layer.k_group_size, LARGEST_BLOCK_WARPS), 0, -1):
        if layer.k_group_size % heads:
            continue
        width = max(
            sum(span.width for span in tile_spans(layer, first, heads, part))
            for first in range(0, all_heads, heads)
            for part in parts
        )
        for teams in range(LARGEST_BLOCK_WARPS // heads, 0, -1):
            for stages in range(MOST_STAGES, 1, -1):
                block = BlockShape(column_tiles, v_tiles, heads, teams, stages, width, resident)
                needed = shared_bytes(layer, block)
                if needed > limits.shared_bytes:
                    continue
                # The driver keeps 1 KiB of each block's shared memory.
                fit = limits.shared_bytes_per_multiprocessor // (needed + 1024)
                yield Plan(
                    **asdict(block),
                    shared_bytes=needed,
                    blocks=all_heads // heads * len(parts),
                    blocks_per_multiprocessor=max(
                        1, min(fit, LARGEST_BLOCK_WARPS // (heads * teams))
                    ),
                )


@cache
def plan(layer: LayerShape, limits: Limits, column_tiles: int) -> Plan | None:
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


def row_blocks(plan: Plan, tokens: int, num_seqs: int, per_kv: int) -> int:
    """Row blocks of a batch that have rows, nearly: half of what it may have at most."""
    return max(num_seqs, -(-tokens * per_kv // plan.columns))


def batch_bounds(plan: Plan, limits: Limits, blocks: int, max_seq_len: int) -> Bounds | None:
    """Bounds on the pieces of a batch of so many row blocks; None if it is not cut."""
    slots = limits.multiprocessors * plan.blocks_per_multiprocessor
    return piece_bounds(blocks, plan.blocks, slots, -(-max_seq_len // plan.turn_tokens))
