"""Launch parameters of the value up-projection."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from recalkv_vllm.kernels.columns import next_power_of_2


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueUpConfig:
    """Parameters of ``value_up.py``: a block of the product is ``rows · columns · depth``."""

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 3


#: Query rows of a program at most.
MANY_ROWS = 64


def value_up_tokens(queries_per_kv: int) -> list[int]:
    """Numbers of tokens that between them get all parameters that :func:`value_up_config` gives."""
    tokens = [1]
    while tokens[-1] * queries_per_kv <= MANY_ROWS:
        tokens.append(2 * tokens[-1])
    return tokens


@cache
def value_up_config(rows: int, head_dim: int, v_width: int) -> ValueUpConfig:
    """Blocks for ``rows`` query rows per KV head; few rows want many programs over columns."""
    many = rows > MANY_ROWS
    block = MANY_ROWS if many else max(16, next_power_of_2(rows))
    depth = min(64, v_width & -v_width)  # the largest power of two that divides the width
    return ValueUpConfig(
        rows=block,
        columns=min(64 if many else 32, next_power_of_2(head_dim)),
        depth=depth,
        # 16 bytes spilled on sm_100 with three.
        stages=2 if (block, depth) == (32, 32) else 3,
    )
