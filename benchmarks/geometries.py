"""Attention geometries of known models, and what a layer's latent looks like at a compression."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from recalkv_vllm.checkpoint import SPAN_MULTIPLE
from recalkv_vllm.span import Span


@dataclass(frozen=True, slots=True)
class Geometry:
    """A model's attention; ``layers`` is how many caches take turns in a decode step."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: int
    rope_theta: float
    key_bias: bool = False
    key_norm: bool = False

    @property
    def dense_width(self) -> int:
        """Elements that an uncompressed cache holds per token and layer."""
        return 2 * self.num_kv_heads * self.head_dim

    def cache_bytes(self, context: int, batch: int, dtype: torch.dtype) -> int:
        """Bytes of one layer's uncompressed cache."""
        return context * batch * self.dense_width * dtype.itemsize


SPANS = ("split", "shared-v", "joint", "nested")
#: Columns that keys read of a nested span: this share of them, and this many at most.
NESTED_SHARE = 0.75
NESTED_KEYS = 192
GEOMETRIES = {
    geometry.name: geometry
    for geometry in (
        Geometry("smollm2-135m", 9, 3, 64, 30, 1e5),
        Geometry("llama-3.1-8b", 32, 8, 128, 32, 5e5),
        Geometry("llama-2-7b", 32, 32, 128, 32, 1e4),
        Geometry("qwen2.5-7b", 28, 4, 128, 28, 1e6, key_bias=True),
        Geometry("qwen3-8b", 32, 8, 128, 36, 1e6, key_norm=True),
    )
}


@dataclass(frozen=True, slots=True)
class Latent:
    """Spans of one layer."""

    rank: int
    k_spans: tuple[Span, ...]
    v_spans: tuple[Span, ...]

    @property
    def k_width(self) -> int:
        return self.k_spans[0].width

    @property
    def v_width(self) -> int:
        return self.v_spans[0].width

    @property
    def regions(self) -> tuple[Span, ...]:
        """Disjoint and sorted: columns that the same spans read."""
        cuts = sorted({edge for span in (*self.k_spans, *self.v_spans) for edge in span})
        return tuple(Span(a, b) for a, b in itertools.pairwise(cuts))


def _row(groups: int, width: int, start: int) -> tuple[Span, ...]:
    return tuple(Span(start + i * width, start + (i + 1) * width) for i in range(groups))


def latent_of(geometry: Geometry, compression: float, group_size: int, spans: str) -> Latent:
    """Equal spans for all groups, as wide as the compression leaves, in whole steps of 16.

    Args:
        spans: ``split`` gives keys and values half of the latent each, ``shared-v`` the same with
            one V span that all heads read; with ``joint`` a group's keys and values read the same,
            twice as wide span, of which ``nested`` keys read the first columns only.
    """
    groups = geometry.num_kv_heads // group_size

    def width(count: int, share: float) -> int:
        elements = (1 - compression) * geometry.dense_width * share / count
        return max(1, int(elements / SPAN_MULTIPLE + 1e-9)) * SPAN_MULTIPLE

    if spans in ("joint", "nested"):
        both = _row(groups, width(groups, 1.0), 0)
        keys = both[0].width
        if spans == "nested":
            share = int(NESTED_SHARE * keys) // SPAN_MULTIPLE * SPAN_MULTIPLE
            keys = max(SPAN_MULTIPLE, min(NESTED_KEYS, share))
        return Latent(both[-1].end, tuple(Span(a, a + keys) for a, _ in both), both)
    k_spans = _row(groups, width(groups, 0.5), 0)
    v_count = 1 if spans == "shared-v" else groups
    v_spans = _row(v_count, width(v_count, 0.5), k_spans[-1].end)
    return Latent(v_spans[-1].end, k_spans, v_spans)


def group_sizes(geometry: Geometry) -> tuple[int, ...]:
    """KV heads per K group that are worth a look: 1, 2 and 4, or all of an odd number."""
    return tuple(n for n in (1, 2, 3, 4) if geometry.num_kv_heads % n == 0)
