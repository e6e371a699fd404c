"""Which part of a layer's latent and factors one tensor-parallel rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from recalkv_vllm.band_format import Band
from recalkv_vllm.checkpoint import AttentionGeometry, LatentLayout
from recalkv_vllm.span import Span


@dataclass(frozen=True, slots=True)
class LatentShard:
    """One rank's share of a layer.

    Args:
        columns: rows of ``down`` (elements of the latent) that this rank caches, ascending.
        kv_heads: its KV heads; as many in each of its K groups.
        k_spans: spans of its K groups in its own latent of ``len(columns)`` elements.
        v_spans: spans of its V groups, likewise.
        bands: of its own latent, if it is in bands.
        key_scales: that its tokens have in the cache, where keys are normed.
    """

    columns: tuple[int, ...]
    kv_heads: range
    k_spans: tuple[Span, ...]
    v_spans: tuple[Span, ...]
    bands: tuple[Band, ...] | None = None
    key_scales: int = 0

    @property
    def rank(self) -> int:
        return len(self.columns)


def shard_latent(
    layout: LatentLayout, geometry: AttentionGeometry, tp_rank: int, tp_size: int
) -> LatentShard:
    """Give ``tp_rank`` its KV heads, and the latents of the K and V groups that they read.

    A group that the heads of several ranks read is held by each of them, as the latent of MLA is;
    each holds its own heads' rows of the up factors. With more ranks than KV heads, as in vLLM,
    several ranks hold the same head.

    Raises:
        ValueError: when KV heads and ranks do not divide one another, or when groups do not fall
            on rank boundaries evenly, so that ranks would hold heads of unequal groups; or when
            keys are normed over heads of several ranks.
    """
    num_heads = geometry.num_kv_heads
    if num_heads % tp_size and tp_size % num_heads:
        raise ValueError(
            f"tensor_parallel_size: expected a divisor or a multiple of the {num_heads} KV heads, "
            f"found {tp_size}"
        )
    if geometry.key_norm == "token" and tp_size > 1:
        raise ValueError(
            "tensor_parallel_size: expected 1 for a model whose keys are normed over all heads, "
            f"found {tp_size}"
        )
    heads_per_rank = max(1, num_heads // tp_size)
    first = tp_rank * num_heads // tp_size
    kv_heads = range(first, first + heads_per_rank)

    def spans_read(spans: tuple[Span, ...], kind: str) -> tuple[Span, ...]:
        heads_per_group = num_heads // len(spans)
        larger, smaller = sorted((heads_per_rank, heads_per_group), reverse=True)
        if larger % smaller:
            raise ValueError(
                f"tensor_parallel_size: expected ranks of whole {kind} groups or {kind} groups of "
                f"whole ranks, found {tp_size} ranks of {heads_per_rank} KV heads and "
                f"{len(spans)} {kind} groups of {heads_per_group}"
            )
        return spans[kv_heads.start // heads_per_group : (kv_heads.stop - 1) // heads_per_group + 1]

    k_spans, v_spans = spans_read(layout.k_spans, "K"), spans_read(layout.v_spans, "V")
    columns = sorted({c for start, end in (*k_spans, *v_spans) for c in range(start, end)})
    position = {column: i for i, column in enumerate(columns)}

    def local(spans: tuple[Span, ...]) -> tuple[Span, ...]:
        return tuple(Span(position[start], position[end - 1] + 1) for start, end in spans)

    bands = None
    if layout.bands is not None:
        # Spans start and end where bands do: each is here whole or not at all.
        ends = accumulate(band.columns for band in layout.bands)
        bands = tuple(
            band for band, end in zip(layout.bands, ends, strict=True) if end - 1 in position
        )
    key_scales = geometry.key_scales(heads_per_rank)
    return LatentShard(tuple(columns), kv_heads, local(k_spans), local(v_spans), bands, key_scales)
