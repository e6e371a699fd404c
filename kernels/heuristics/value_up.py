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


@cache
def value_up_config(rows: int, head_dim: int, v_width: int) -> ValueUpConfig:
    """Blocks for ``rows`` query rows per KV head; few rows want many programs over columns."""
    many = rows > 64
    return ValueUpConfig(
        rows=64 if many else max(16, next_power_of_2(rows)),
        columns=min(64 if many else 32, next_power_of_2(head_dim)),
        depth=min(64, v_width & -v_width),  # the largest power of two that divides the width
    )
