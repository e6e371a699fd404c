"""The interface of compression methods, and the part that methods with disjoint spans share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch

from recalkv_vllm.checkpoint import AttentionGeometry, LatentLayout, Span
from recalkv_vllm.compression.factors import LayerFactors, LayerInputs, reorder_rows
from recalkv_vllm.compression.ranks import LayerRanks, allocate_layers, check_compression
from recalkv_vllm.compression.statistics import InputStatistics, Statistics

ALLOCATIONS = ("fisher", "uniform")


class Method(ABC):
    """A way to choose ranks and factors. A new method is one subclass in its own file.

    Args:
        geometry: of the model.
        k_group_size: KV heads per K group; divides ``h_kv``.
        v_groups: V groups; divides ``h_kv``. The method's default if not given.
        rank_allocation: ``fisher`` or ``uniform``. The method's default if not given.
    """

    name: ClassVar[str]
    default_allocation: ClassVar[str]

    def __init__(
        self,
        geometry: AttentionGeometry,
        k_group_size: int,
        v_groups: int | None = None,
        rank_allocation: str | None = None,
    ):
        self.geometry = geometry
        self.k_group_size = k_group_size
        self.v_groups = v_groups or self.default_v_groups(geometry, k_group_size)
        self.rank_allocation = rank_allocation or self.default_allocation

    @staticmethod
    def default_v_groups(geometry: AttentionGeometry, k_group_size: int) -> int:
        """V groups if the user names none: one over all heads, as in ReCalKV."""
        return 1

    def observers(self, compression: float) -> set[str]:
        """Names of the statistics needed (:data:`..observers.OBSERVERS`)."""
        return {"fisher"} if compression > 0 and self.rank_allocation == "fisher" else set()

    def check(self, compression: float) -> None:
        """Raise :class:`InputError`, before any work, for a compression that cannot be reached."""
        check_compression(compression, self.geometry, self.k_group_size, self.v_groups)

    def ranks(self, compression: float, statistics: Statistics | None) -> list[LayerRanks]:
        """Ranks of all layers; full rank at compression 0."""
        geometry = self.geometry
        if compression == 0:
            k_width = self.k_group_size * geometry.head_dim
            v_width = geometry.num_kv_heads // self.v_groups * geometry.head_dim
            return [LayerRanks(k_width, v_width)] * geometry.num_layers
        if self.rank_allocation == "fisher":
            assert statistics is not None
            sensitivity = fisher_sensitivity(statistics, geometry.num_layers)
        else:
            sensitivity = np.ones((geometry.num_layers, 2))
        return allocate_layers(sensitivity, geometry, self.k_group_size, self.v_groups, compression)

    @abstractmethod
    def factor(self, inputs: LayerInputs, ranks: LayerRanks) -> LayerFactors:
        """Factor one layer in float64."""


def fisher_sensitivity(statistics: Statistics, num_layers: int) -> np.ndarray:
    """Root of the diagonal Fisher information, summed over each projection: ``[layers, 2]`` (K, V).

    Ranks are proportional to it (Palu, section 3.3; the root is in the published code). Without
    the root a few layers get nearly everything.
    """
    return np.stack([np.sqrt(statistics.fisher(i)).sum(axis=(1, 2)) for i in range(num_layers)])


class SplitMethod(Method):
    """Keys and values are factored apart, every group on its own: spans are disjoint."""

    def head_order(self, inputs: LayerInputs) -> tuple[int, ...]:
        """KV heads in the order that makes K groups contiguous; natural unless overridden."""
        return tuple(range(inputs.num_kv_heads))

    @abstractmethod
    def key_factors(
        self, weight: torch.Tensor, rank: int, statistics: InputStatistics | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``L: [s·d, rank]`` and ``R: [rank, H]`` of one K group ``[s·d, H]``."""

    @abstractmethod
    def value_factors(
        self, weight: torch.Tensor, rank: int, statistics: InputStatistics | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for one V group."""

    def factor(self, inputs: LayerInputs, ranks: LayerRanks) -> LayerFactors:
        order = self.head_order(inputs)
        k_groups = self.geometry.num_kv_heads // self.k_group_size
        keys = [
            self.key_factors(weight, ranks.k_width, inputs.statistics)
            for weight in reorder_rows(inputs.k_weight, order).chunk(k_groups)
        ]
        values = [
            self.value_factors(weight, ranks.v_width, inputs.statistics)
            for weight in reorder_rows(inputs.v_weight, order).chunk(self.v_groups)
        ]
        k_spans = _consecutive_spans(0, ranks.k_width, k_groups)
        v_spans = _consecutive_spans(k_spans[-1][1], ranks.v_width, self.v_groups)
        return LayerFactors(
            layout=LatentLayout(v_spans[-1][1], self.k_group_size, k_spans, v_spans, order),
            down=torch.cat([down for _, down in keys + values]),
            k_up=torch.stack([up for up, _ in keys]),
            v_up=torch.cat([up for up, _ in values]).unflatten(0, (inputs.num_kv_heads, -1)),
        )


def _consecutive_spans(start: int, width: int, count: int) -> tuple[Span, ...]:
    return tuple((start + i * width, start + (i + 1) * width) for i in range(count))
