"""Layers measured in groups of several sizes, each once for every order of heads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from recalkv_vllm.compression.layer import LayerInputs
from recalkv_vllm.compression.lowrank.layer_metric import LayerMetric


class Ordered(Protocol):
    """A measured layer, as far as its heads have an order."""

    @property
    def head_order(self) -> tuple[int, ...]: ...


Layer = TypeVar("Layer", bound=Ordered)


@dataclass(frozen=True, slots=True)
class HeadGrouping:
    """How heads are put into groups.

    Args:
        head_dim: elements of a head.
        which: the projections that share a latent.
        kept: see :meth:`LayerMetric.head_order`.
        reorder: groups may be of any heads; else of neighbors.
    """

    head_dim: int
    which: Sequence[int]
    kept: float
    reorder: bool

    def order(self, metric: LayerMetric, size: int) -> tuple[int, ...]:
        """KV heads so ordered that groups of ``size`` are contiguous."""
        if not self.reorder:
            return tuple(range(metric.num_heads))
        return metric.head_order(size, self.kept, self.which)


def measure_sizes(
    layers: Iterable[LayerInputs],
    sizes: Collection[int],
    grouping: HeadGrouping,
    measure: Callable[[LayerMetric, tuple[int, ...], int], Layer],
    before: Mapping[int, Sequence[Layer]] | None,
) -> dict[int, list[Layer]]:
    """Measured layers by group size.

    Args:
        layers: what there is to factor.
        sizes: KV heads per K group.
        grouping: of the heads.
        measure: one layer with its heads in an order, in groups of a size.
        before: what this function returned for the same layers, sizes and ``measure``; a layer
            whose heads come in the same order is not measured again.
    """
    measured: dict[int, list[Layer]] = {size: [] for size in sizes}
    for inputs in layers:
        metric = LayerMetric(inputs, grouping.head_dim)
        for size, done in measured.items():
            order = grouping.order(metric, size)
            known = before[size][inputs.index] if before else None
            if known is None or known.head_order != order:
                known = measure(metric, order, size)
            done.append(known)
    return measured
