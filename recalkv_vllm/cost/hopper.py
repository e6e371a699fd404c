"""What the CUDA C++ kernel for sm_90a spends on a cached token, by its instruction budgets.

A block has all query rows of a K group and reconstructs keys 64 tokens at a time with ``wgmma``,
whose factor is read from shared memory once per tile. Bulk copies write the latents; codes are
dequantized into operand registers. Values are accumulated once per group, where all its heads read
one V span.
"""

from __future__ import annotations

from recalkv_vllm.cost.kernel import Spent
from recalkv_vllm.cost.layer import LayerCost

TILE = 64
#: Query rows are padded to this many.
ROWS = 8
#: Budgets of warp instructions in the loop over tiles, of a K group: whatever the sizes, for each
#: token and element of a head's key, and for each token and column of codes. With one head of 128
#: per group and 128 columns, 1500 for 16-bit latents and 1900 for codes.
PER_TILE = 400
PER_KEY_ELEMENT = 1100 / (TILE * 128)
PER_CODE = 400 / (TILE * 128)
HEAD_DIMS = (64, 96, 128)


def hopper_spends(layer: LayerCost, arch: int) -> Spent | None:
    """None where the kernel does not run."""
    if arch != 90 or layer.head_dim not in HEAD_DIMS:
        return None
    heads, dim, rows = layer.k_group_size, layer.head_dim, _padded(layer.rows)
    # V groups within a K group are accumulated one by one, with the rows of their heads.
    v_groups = max(1, heads // layer.v_group_size)
    v_rows = _padded(heads // v_groups * layer.rows)
    columns = layer.k_width + v_groups * (layer.v_width - layer.shared)
    keys = heads * dim * (layer.k_width + rows)
    values = v_groups * layer.v_width * v_rows
    loaded = layer.token_bytes / layer.k_groups
    # Latents in 16 bits are operands in shared memory, those of keys once for each head.
    operands = 0 if layer.coded else 2 * (heads * layer.k_width + v_groups * layer.v_width)
    factors = 2 * heads * dim * (layer.k_width + rows) / TILE
    probabilities = 4 * v_groups * v_rows
    return Spent(
        "cuda",
        layer.k_groups * 2 * (keys + values),
        layer.k_groups * (2 * loaded + operands + factors + probabilities),
        layer.k_groups
        * (PER_TILE / TILE + PER_KEY_ELEMENT * heads * dim + layer.coded * PER_CODE * columns),
    )


def _padded(rows: int) -> int:
    return -(-rows // ROWS) * ROWS
