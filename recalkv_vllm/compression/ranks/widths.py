"""Which widths of K and V spans a layer may have."""

from __future__ import annotations

import math
from dataclasses import dataclass

from recalkv_vllm.checkpoint import SPAN_MULTIPLE, AttentionGeometry


@dataclass(frozen=True, slots=True)
class Widths:
    """Elements cached per token by one layer, and the width of every K span and every V span."""

    rank: int
    k_width: int
    v_width: int


def candidate_widths(
    spans: str, geometry: AttentionGeometry, k_group_size: int, v_groups: int
) -> list[Widths]:
    """All widths that are worth a look.

    Args:
        spans: one of :data:`recalkv_vllm.names.SPAN_KINDS`.
        geometry: of the model.
        k_group_size: KV heads per K group.
        v_groups: V groups, for ``split``; of the other kinds the K groups.
    """
    all_rows = geometry.num_kv_heads * geometry.head_dim
    k_groups = geometry.num_kv_heads // k_group_size
    rows = k_group_size * geometry.head_dim
    if spans == "split":
        return [
            Widths(k_groups * k + v_groups * v, k, v)
            for k in _multiples(min(rows, geometry.hidden_size))
            for v in _multiples(min(all_rows // v_groups, geometry.hidden_size))
        ]
    # Keys of n elements need no more than n columns of any latent.
    needed = -(-rows // SPAN_MULTIPLE)
    narrower = [SPAN_MULTIPLE * n for n in falling_steps(needed)] if spans == "nested" else []
    return [
        Widths(k_groups * width, k_width, width)
        for width in _multiples(min(2 * rows, geometry.hidden_size))
        for k_width in sorted({width, *(k for k in narrower if k < width)})
        if spans == "joint" or k_width <= SPAN_MULTIPLE * needed
    ]


def falling_steps(most: int) -> list[int]:
    """Whole numbers from 1 to ``most``, in steps of a root of two; none if ``most`` is 0."""
    if most < 1:
        return []
    steps, at = {most}, float(most)
    while at > 1:
        at /= math.sqrt(2)
        steps.add(max(1, round(at)))
    return sorted(steps)


def _multiples(largest: int) -> range:
    return range(SPAN_MULTIPLE, largest + 1, SPAN_MULTIPLE)
