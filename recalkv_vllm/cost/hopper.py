"""What the CUDA C++ kernel for sm_90a spends on a cached token.

A block of threads has up to eight query rows of one KV head and up to 256 columns of its V span. It
reconstructs keys 64 tokens at a time with ``wgmma``; blocks of heads that share latents read them
from L2 after the first.
"""

from __future__ import annotations

from dataclasses import dataclass

from recalkv_vllm.cost.kernel import Spent
from recalkv_vllm.cost.layer import LayerCost

KERNEL = "cuda"
#: The compute capability, without the dot.
ARCH = 90
TILE = 64
HEAD_DIMS = (64, 96, 128)
#: V tiles, of 16 columns, and tiles of query rows that the kernel is compiled for.
V_TILES = (8, 16)
ROWS = 4
ROW_TILES = 2
#: Shared memory of a block (CUDA C++ Programming Guide, compute capability 9.0).
SHARED_BYTES = 227 << 10
#: Warpgroups that take tiles, of which each dequantizes two at once into slots of its own. One has
#: to do where slots for two do not fit; a scheduler then has one warp, not two, and is supposed to
#: issue half as much.
CONSUMER_GROUPS = 2
TURN = 2


@dataclass(frozen=True, slots=True)
class Instructions:
    """Warp instructions of a block in the loop over tiles, per tile of 64 tokens.

    Args:
        fixed: whatever the sizes.
        per_dim: for each element of a key.
        per_row_tile: for four query rows.
        per_v_tile: for each V tile of the compiled kernel.
        per_k_column: for each column of the K span.
        per_v_column: for each other column of the V span.
    """

    fixed: float
    per_dim: float
    per_row_tile: float
    per_v_tile: float
    per_k_column: float
    per_v_column: float


#: By whether latents are codes: least squares over the loops of the lean kernels in bfloat16, which
#: ``python -m recalkv_vllm.benchmarks.hopper_counts`` counts and fits again; a kernel that is not
#: lean takes more. Each count is within :data:`TOLERANCE`.
COUNTED = {
    False: Instructions(4.159, 3.491, 280.4, 16.86, 2.832, 1.370),
    True: Instructions(216.8, 3.584, 215.8, 14.86, 6.520, 5.464),
}
TOLERANCE = 0.1


def hopper_spends(layer: LayerCost, arch: int) -> Spent | None:
    """None where the kernel does not run."""
    # Elements only of groups of one head: others read them from L2 once for each.
    readable = layer.bands if layer.coded else layer.k_group_size == 1
    if arch != ARCH or layer.head_dim not in HEAD_DIMS or not readable:
        return None
    if not consumer_groups(layer):
        return None
    dim, v_tiles, row_tiles = layer.head_dim, compiled_v_tiles(layer), compiled_row_tiles(layer)
    row_blocks = -(-layer.rows // (ROWS * row_tiles))
    v_blocks = -(-layer.v_width // (16 * v_tiles))
    v_width = layer.v_width / v_blocks
    blocks = layer.num_kv_heads * row_blocks * v_blocks
    # Each row takes two columns of the scores' product: its value and its derivative.
    flop = 2 * (dim * (layer.k_width + 8 * row_tiles) + 8 * v_width)
    counted = COUNTED[layer.coded]
    per_tile = (
        counted.fixed
        + counted.per_dim * dim
        + counted.per_row_tile * row_tiles
        + counted.per_v_tile * v_tiles
        + counted.per_k_column * layer.k_width
        + counted.per_v_column * (_columns(layer, v_width) - layer.k_width)
    )
    return Spent(
        KERNEL,
        blocks * flop,
        blocks * _shared_bytes(layer, v_width, row_tiles),
        blocks * per_tile / TILE * CONSUMER_GROUPS / consumer_groups(layer),
    )


def compiled_v_tiles(layer: LayerCost) -> int:
    """Of the kernel that a layer takes."""
    return next((tiles for tiles in V_TILES if 16 * tiles >= layer.v_width), V_TILES[-1])


def compiled_row_tiles(layer: LayerCost) -> int:
    """Of the kernel that a layer takes."""
    return 1 if layer.rows <= ROWS else ROW_TILES


def consumer_groups(layer: LayerCost) -> int:
    """Warpgroups that take tiles; 0 if the kernel does not run."""
    return next((n for n in (CONSUMER_GROUPS, 1) if _fits(layer, n)), 0)


def _row_bytes(layer: LayerCost) -> float:
    """Of a token in a tile: what one head reads."""
    return layer.columns * layer.token_bytes / layer.columns_of_all


def _shared_bytes(layer: LayerCost, v_width: float, row_tiles: int) -> float:
    """Of a block per cached token: latents written and read, those that are codes once more as
    elements; queries written by one warp and read by four; the factor and the rotation, read once
    for 64 tokens."""
    row = _row_bytes(layer)
    latents = row + 2 * (layer.k_width + v_width)
    if layer.coded:
        latents += row + 2 * _columns(layer, v_width)
    queries = 16 * row_tiles * layer.head_dim * (1 + 4) / TILE
    factor = 2 * layer.head_dim * layer.k_width / TILE
    return latents + queries + factor + _rotation_bytes(layer) / TILE


def _columns(layer: LayerCost, v_width: float) -> float:
    """That a block of threads reads at most, with so many of the V span."""
    return layer.k_width + v_width - max(0, layer.shared - (layer.v_width - v_width))


def _rotation_bytes(layer: LayerCost) -> int:
    """The table by which a lean kernel turns half of a key's pairs."""
    return 64 * layer.head_dim


def _fits(layer: LayerCost, groups: int) -> bool:
    """Whether the factor fits beside tiles that as many warpgroups take, and their queries."""
    if not layer.coded and groups < CONSUMER_GROUPS:
        return False
    padded = layer.k_width if layer.coded else -(-layer.k_width // 64) * 64
    factor = 2 * layer.head_dim * padded
    queries = 16 * compiled_row_tiles(layer) * layer.head_dim
    turn = TURN if layer.coded else 1
    tiles = groups * turn * (TILE * (_row_bytes(layer) + 16) + queries)
    columns = _columns(layer, min(layer.v_width, 16 * compiled_v_tiles(layer)))
    slots = groups * TURN * 2 * TILE * columns if layer.coded else 0
    return factor + _rotation_bytes(layer) + tiles + slots <= SHARED_BYTES
