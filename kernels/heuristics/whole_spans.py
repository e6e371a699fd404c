"""Where keys of nested spans better read all of what their values read."""

from __future__ import annotations

from recalkv_vllm.kernels.heuristics.rules import ragged
from recalkv_vllm.kernels.heuristics.targets import NARROW_MMA, Target


def prefers_whole_spans(k_width: int, v_width: int, target: Target) -> bool:
    """Whether keys that read the first ``k_width`` of ``v_width`` columns are to read the others
    too, with factors of zero.

    A tile has them for its values. Up to half as many products more, but of even widths, take
    fewer instructions and registers than a width that ends in products of another kind: of 64
    tokens on sm_90, 51 instead of 63 instructions a token for 96 of 128 columns, and 77 instead of
    81 for 144 of 192 beside a bias, where up to 72 bytes of registers spilled. On sm_80, up to an
    eighth more, but up to 56 bytes spilled.
    """
    uneven = ragged(k_width) or target.family in NARROW_MMA
    return k_width < v_width and 2 * v_width <= 3 * k_width and uneven
