"""Which widths of K and V spans a layer may have within a budget of reconstruction."""

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
    spans: str, geometry: AttentionGeometry, k_group_size: int, v_groups: int, flop_per_byte: float
) -> list[Widths]:
    """All widths that cost no more than ``flop_per_byte`` to reconstruct keys from.

    A layer spends ``2 · w_k · h_kv · d`` FLOP per cached token of ``2 · rank`` bytes (bf16).

    Args:
        spans: one of :data:`recalkv_vllm.names.SPAN_KINDS`.
        geometry: of the model.
        k_group_size: KV heads per K group.
        v_groups: V groups, for ``split``; of the other kinds the K groups.
        flop_per_byte: may be infinite.
    """
    all_rows = geometry.num_kv_heads * geometry.head_dim
    k_groups = geometry.num_kv_heads // k_group_size
    rows = k_group_size * geometry.head_dim
    # Keys of n elements need no more than n columns of any latent.
    needed = -(-rows // SPAN_MULTIPLE) * SPAN_MULTIPLE
    if spans == "split":
        found = [
            Widths(k_groups * k + v_groups * v, k, v)
            for k in _multiples(min(rows, geometry.hidden_size))
            for v in _multiples(min(all_rows // v_groups, geometry.hidden_size))
        ]
    else:
        found = []
        for width in _multiples(min(2 * rows, geometry.hidden_size)):
            k_width = width
            if spans == "nested":
                paid = min(flop_per_byte * width / rows, width)
                k_width = min(math.floor(paid / SPAN_MULTIPLE) * SPAN_MULTIPLE, needed)
            found.append(Widths(k_groups * width, k_width, width))
    return [w for w in found if w.k_width > 0 and w.k_width * all_rows <= flop_per_byte * w.rank]


def _multiples(largest: int) -> range:
    return range(SPAN_MULTIPLE, largest + 1, SPAN_MULTIPLE)
