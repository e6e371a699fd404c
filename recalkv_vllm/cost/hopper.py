"""What the CUDA C++ kernel for sm_90a spends on a cached token, by its instruction budgets.

A block has all query rows of a K group, or of as many heads as have their factors in shared memory,
and reconstructs keys 64 tokens at a time with ``wgmma``. Bulk copies write the latents; codes are
dequantized into operand registers. Values are accumulated once per block, where all its heads read
one V span.
"""

from __future__ import annotations

from recalkv_vllm.cost.kernel import Spent
from recalkv_vllm.cost.layer import LayerCost

TILE = 64
#: Query rows are padded to this many.
ROWS = 8
#: Budgets of warp instructions in the loop over tiles, of a block: whatever the sizes, for each
#: token and element of a head's key, and for each token and column of codes. With one head of 128
#: per group and 128 columns, 1500 for 16-bit latents and 1900 for codes.
PER_TILE = 400
PER_KEY_ELEMENT = 1100 / (TILE * 128)
PER_CODE = 400 / (TILE * 128)
HEAD_DIMS = (64, 96, 128)


#: What the factor may take of shared memory, beside a ring of tiles.
FACTOR_BYTES = 160 << 10


def hopper_spends(layer: LayerCost, arch: int) -> Spent | None:
    """None where the kernel does not run."""
    heads = heads_per_block(layer)
    if arch != 90 or layer.head_dim not in HEAD_DIMS or heads == 0:
        return None
    blocks, dim, rows = layer.num_kv_heads // heads, layer.head_dim, _padded(layer.rows)
    # V groups within a block are accumulated one by one, with the rows of their heads.
    v_groups = max(1, heads // layer.v_group_size)
    v_rows = _padded(heads // v_groups * layer.rows)
    v_columns = v_groups * layer.v_width
    columns = layer.k_width + v_groups * (layer.v_width - layer.shared)
    keys = heads * dim * (layer.k_width + rows)
    # Elements are operands in shared memory, those of keys once for each head; codes are not.
    operands = 0 if layer.coded else 2 * (heads * layer.k_width + v_columns)
    loaded = columns * (layer.token_bytes / layer.columns_of_all)
    factors = 2 * heads * dim * (layer.k_width + rows) / TILE
    instructions = (
        PER_TILE / TILE + PER_KEY_ELEMENT * heads * dim + layer.coded * PER_CODE * columns
    )
    return Spent(
        "cuda",
        blocks * 2 * (keys + v_columns * v_rows),
        blocks * (2 * loaded + operands + factors + 4 * v_groups * v_rows),
        blocks * instructions,
    )


def heads_per_block(layer: LayerCost) -> int:
    """KV heads of a K group whose factors fit into shared memory together; 0 if one does not."""
    head_bytes = 2 * layer.head_dim * layer.k_width
    fitting = (n for n in range(layer.k_group_size, 0, -1) if layer.k_group_size % n == 0)
    return next((n for n in fitting if n * head_bytes <= FACTOR_BYTES), 0)


def _padded(rows: int) -> int:
    return -(-rows // ROWS) * ROWS
