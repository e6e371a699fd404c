"""Decode attention of one layer by the CUDA kernel for Hopper: plans and launches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from recalkv_vllm.band_format import BLOCK_COLUMNS, BandFormat
from recalkv_vllm.cost import GPUS
from recalkv_vllm.cost.gpu import fastest_kernel
from recalkv_vllm.cost.hopper import KERNEL
from recalkv_vllm.kernels.heuristics import AttentionShape, Target
from recalkv_vllm.ops.contract import LatentLayer
from recalkv_vllm.ops.cuda.attention import DecodeAttention
from recalkv_vllm.ops.cuda.cost import layer_cost
from recalkv_vllm.ops.cuda.hopper_bands import BandTables, band_tables
from recalkv_vllm.ops.cuda.hopper_layout import SWIZZLED_COLUMNS, TILE, pack_hopper_layer
from recalkv_vllm.ops.cuda.plan import tile_spans, v_blocks
from recalkv_vllm.ops.cuda.shapes import LayerShape, Limits, Plan

#: V tiles (of 16 columns) and tiles of four query rows of the instantiations: hopper_launch.cuh.
HOPPER_V_TILES = (8, 16)
HOPPER_COLUMN_TILES = (1, 2)
#: Tiles in a block's ring at most; always a multiple of what all warpgroups take in a turn, so that
#: each sees every phase of the barriers that it waits for.
MOST_STAGES = 6
#: Tiles that a warpgroup takes in a turn where latents are in bands.
TURN = 2
CONSUMER_WARPS = 8


@dataclass(frozen=True, slots=True)
class HopperPlan(Plan):
    """A plan of the kernel for Hopper; teams are the warpgroups that take tiles in turns."""

    lean_kernel: bool
    turn: int

    @property
    def columns(self) -> int:
        """Query rows of a block: each takes two columns of a product."""
        return 4 * self.column_tiles

    @property
    def tokens(self) -> int:
        return TILE * self.turn

    @property
    def lean(self) -> bool:
        return self.lean_kernel


def value_tiles(layer: LayerShape) -> int:
    """V tiles of the instantiation for a layer."""
    return next((n for n in HOPPER_V_TILES if 16 * n >= layer.v_width), HOPPER_V_TILES[-1])


def hopper_plan(
    layer: LayerShape,
    limits: Limits,
    column_tiles: int,
    lean: bool,
    bands: BandTables | None = None,
) -> HopperPlan | None:
    """The plan with most warpgroups, and of these with most stages; None if the factor does not fit
    beside two tiles."""
    v_tiles = value_tiles(layer)
    width = plain_width(layer, v_tiles) if bands is None else bands.tile_width
    turn = 1 if bands is None else TURN
    rings = [
        (teams, stages)
        for teams in ((2,) if bands is None else (2, 1))
        for stages in range(MOST_STAGES, 1, -1)
        if stages % (teams * turn) == 0
    ]
    for teams, stages in rings:
        needed = hopper_shared_bytes(
            layer, column_tiles, v_tiles, teams, stages, width, lean, bands
        )
        if needed <= limits.shared_bytes:
            return HopperPlan(
                column_tiles=column_tiles,
                v_tiles=v_tiles,
                heads=1,
                teams=teams,
                stages=stages,
                tile_width=width,
                resident=True,
                shared_bytes=needed,
                blocks=len(layer.k_spans) * len(v_blocks(layer, v_tiles)),
                blocks_per_multiprocessor=1,
                lean_kernel=lean,
                turn=turn,
            )
    return None


def plain_width(layer: LayerShape, v_tiles: int) -> int:
    """Columns of a tile of latents that are not coded: products read 64 of the K span at a time."""
    padded = -(-layer.k_width // SWIZZLED_COLUMNS) * SWIZZLED_COLUMNS
    width = 0
    for head, part in product(range(len(layer.k_spans)), v_blocks(layer, v_tiles)):
        spans = tile_spans(layer, head, 1, part)
        start = layer.k_spans[head].start
        k_offset = sum(min(span.end, start) - span.start for span in spans if span.start < start)
        width = max(width, sum(span.width for span in spans), k_offset + padded)
    return width


def hopper_shared_bytes(
    layer: LayerShape,
    column_tiles: int,
    v_tiles: int,
    teams: int,
    stages: int,
    width: int,
    lean: bool,
    bands: BandTables | None,
) -> int:
    """Shared memory of a block; mirrors ``HopperLayout`` in ``hopper_shape.cuh``."""
    dim, columns = layer.head_dim, 4 * column_tiles
    padded = layer.k_width if bands else -(-layer.k_width // SWIZZLED_COLUMNS) * SWIZZLED_COLUMNS
    fixed = padded * dim * 2
    fixed += dim // (32 if lean else 16) * 2048
    fixed += dim * 4 * layer.key_bias
    fixed += -(-width // 32) * 16 + (stages + 1) * 16
    stage = TILE * (width * 2 + 16) + column_tiles * dim // 32 * 512
    if bands is not None:
        slots = teams * TURN * bands.most_blocks
        fixed += slots * TILE * BLOCK_COLUMNS * 2 + (bands.most_blocks + 2) * 16
        stage += TILE * bands.token_scales
    merge = CONSUMER_WARPS * columns * 8 + columns * (16 * v_tiles + 4) * 4
    return fixed + max(stages * stage, merge)


class HopperAttention(DecodeAttention):
    """Decode attention by the kernel for Hopper: one KV head to a block, ``wgmma``.

    Raises:
        KernelUnavailableError: the kernel cannot serve this layer; says why.
    """

    formats = (type(None), BandFormat)
    format_names = ("None", "bands")

    def __init__(self, layer: LatentLayer):
        super().__init__(layer)
        self.cost = layer_cost(layer)

    def preferred(self, shape: AttentionShape, target: Target, queries: int) -> bool:
        num_heads = shape.queries_per_kv * shape.num_kv_heads
        cost = replace(self.cost, num_heads=num_heads, queries=queries)
        return fastest_kernel(cost, GPUS["h100"]) == KERNEL

    def prepare(self, layer: LatentLayer, shape: LayerShape) -> dict[int, Plan | None]:
        self.bands = self.band_blocks = k_columns = None
        if isinstance(layer.latent_format, BandFormat):
            self.bands = bands = band_tables(shape, layer.latent_format, value_tiles(shape))
            self.band_blocks = bands.band_blocks().to(self.device)
            self.code_bytes = layer.latent_format.code_bytes
            k_columns = bands.k_columns
        self.packed = packed = pack_hopper_layer(layer, k_columns)
        return {
            tiles: hopper_plan(shape, self.limits, tiles, packed.lean, self.bands)
            for tiles in HOPPER_COLUMN_TILES
        }

    def columns(self, shape: LayerShape, plan: Plan) -> torch.Tensor:
        return super().columns(shape, plan) if self.bands is None else self.bands.tile_columns()

    def elements(self, kv_cache: torch.Tensor) -> torch.Tensor:
        if self.bands is None:
            return kv_cache
        pages, block_size, _ = kv_cache.shape
        strides = (kv_cache.stride(0), self.code_bytes, 1)
        codes = kv_cache.as_strided((pages, block_size, self.code_bytes), strides)
        return codes.view(torch.int16)

    def last_arguments(self) -> tuple[Any, ...]:
        if self.bands is None:
            return None, 0, 0
        return self.band_blocks, self.bands.most_blocks, self.bands.token_scales

    @property
    def op(self) -> Any:
        return torch.ops.recalkv_cuda.decode_hopper
