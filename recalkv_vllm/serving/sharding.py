"""Which part of a layer's latent and factors one tensor-parallel rank holds."""

from __future__ import annotations

from dataclasses import dataclass

from recalkv_vllm.checkpoint import AttentionGeometry, LatentLayout, Span


@dataclass(frozen=True, slots=True)
class LatentShard:
    """One rank's share of a layer.

    Args:
        columns: rows of ``down`` (numbers of the latent) that this rank caches, ascending.
        k_groups: its K groups.
        kv_heads: its KV heads.
        k_spans: spans of its K groups in its own latent of ``len(columns)`` numbers.
        v_spans: spans of its V groups, likewise.
    """

    columns: tuple[int, ...]
    k_groups: range
    kv_heads: range
    k_spans: tuple[Span, ...]
    v_spans: tuple[Span, ...]

    @property
    def rank(self) -> int:
        return len(self.columns)


def shard_latent(
    layout: LatentLayout, geometry: AttentionGeometry, tp_rank: int, tp_size: int
) -> LatentShard:
    """Give whole K groups, and the V groups that their heads read, to ``tp_rank``.

    A V group that the heads of several ranks read is held by each of them, as in MLA.

    Raises:
        ValueError: when the K groups do not divide by ``tp_size``, or when V groups do not fall on
            rank boundaries evenly, so that ranks would cache different amounts.
    """
    groups = len(layout.k_spans)
    if groups % tp_size:
        raise ValueError(
            f"tensor_parallel_size: expected a divisor of the {groups} K groups "
            f"(each of {layout.k_group_size} KV heads), found {tp_size}"
        )
    heads_per_rank = geometry.num_kv_heads // tp_size
    heads_per_v_group = geometry.num_kv_heads // len(layout.v_spans)
    larger, smaller = sorted((heads_per_rank, heads_per_v_group), reverse=True)
    if larger % smaller:
        raise ValueError(
            f"tensor_parallel_size: with {len(layout.v_spans)} V groups of {heads_per_v_group} KV "
            f"heads each, {tp_size} ranks of {heads_per_rank} KV heads cut a V group"
        )
    k_groups = range(tp_rank * groups // tp_size, (tp_rank + 1) * groups // tp_size)
    kv_heads = range(tp_rank * heads_per_rank, (tp_rank + 1) * heads_per_rank)
    v_groups = range(
        kv_heads.start // heads_per_v_group, (kv_heads.stop - 1) // heads_per_v_group + 1
    )
    k_spans = [layout.k_spans[g] for g in k_groups]
    v_spans = [layout.v_spans[g] for g in v_groups]
    columns = sorted({c for start, end in (*k_spans, *v_spans) for c in range(start, end)})
    position = {column: i for i, column in enumerate(columns)}

    def local(spans: list[Span]) -> tuple[Span, ...]:
        return tuple((position[start], position[end - 1] + 1) for start, end in spans)

    return LatentShard(tuple(columns), k_groups, kv_heads, local(k_spans), local(v_spans))
