"""What methods with split spans share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.calibration.statistics import Statistics
from recalkv_vllm.compression.layer import (
    InputStatistics,
    LayerFactors,
    LayerInputs,
    reorder_rows,
    split_factors,
    split_layout,
)
from recalkv_vllm.compression.methods.base import Method, MethodOptions, divisors
from recalkv_vllm.compression.plan import Budget, ModelPlan
from recalkv_vllm.compression.ranks.proportional import allocate_layers
from recalkv_vllm.compression.ranks.reachable import check_compression

#: Where the user names no group size: the paper's, or the largest divisor of h_kv below it.
LARGEST_AUTO_GROUP = 4


@dataclass(frozen=True, slots=True)
class MeasuredHeads:
    """What ranks and groups follow from.

    Args:
        head_orders: KV heads of every layer in the order that makes K groups contiguous.
        sensitivity: ``[layers, 2]`` (K, V); ranks are proportional to it.
    """

    head_orders: list[tuple[int, ...]]
    sensitivity: np.ndarray


class SplitMethod(Method[MeasuredHeads]):
    """Keys and values are factored separately, every group on its own."""

    span_kinds = ("split",)

    def __init__(self, geometry: AttentionGeometry, options: MethodOptions):
        super().__init__(geometry, options)
        self.k_group_size = options.k_group_size or max(
            n for n in divisors(geometry.num_kv_heads) if n <= LARGEST_AUTO_GROUP
        )
        self.v_groups = options.v_groups or self.default_v_groups()

    def default_v_groups(self) -> int:
        """V groups if the user names none: one over all heads, as in ReCalKV."""
        return 1

    def observers(self, compression: float) -> set[str]:
        return {"fisher"} if self._by_fisher(compression) else set()

    def check(self, compression: float) -> None:
        check_compression(compression, self.geometry, self.k_group_size, self.v_groups)

    def measure(
        self,
        compression: float,
        layers: Sequence[LayerInputs],
        statistics: Statistics | None,
        before: MeasuredHeads | None = None,
    ) -> MeasuredHeads:
        sensitivity = np.ones((self.geometry.num_layers, 2))
        if self._by_fisher(compression):
            assert statistics is not None
            sensitivity = fisher_sensitivity(statistics, self.geometry.num_layers)
        return MeasuredHeads([self.head_order(inputs) for inputs in layers], sensitivity)

    def plan(self, measured: MeasuredHeads, budget: Budget) -> ModelPlan:
        geometry = self.geometry
        if budget.compression == 0:
            k_width = self.k_group_size * geometry.head_dim
            v_width = geometry.num_kv_heads // self.v_groups * geometry.head_dim
            widths = [(k_width, v_width)] * geometry.num_layers
        else:
            widths = allocate_layers(
                measured.sensitivity,
                geometry,
                self.k_group_size,
                self.v_groups,
                budget.compression,
            )
        layouts = (
            split_layout(order, self.k_group_size, self.v_groups, k_width, v_width)
            for order, (k_width, v_width) in zip(measured.head_orders, widths, strict=True)
        )
        return ModelPlan(tuple(layouts), self.spans, budget.latent_format)

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

    def factor(self, inputs: LayerInputs, plan: ModelPlan) -> LayerFactors:
        layout = plan.layouts[inputs.index]
        k_weight, v_weight = (
            reorder_rows(weight, layout.head_order) for weight in (inputs.k_weight, inputs.v_weight)
        )
        keys = [
            self.key_factors(weight, layout.k_width, inputs.statistics)
            for weight in k_weight.chunk(len(layout.k_spans))
        ]
        values = [
            self.value_factors(weight, layout.v_width, inputs.statistics)
            for weight in v_weight.chunk(len(layout.v_spans))
        ]
        return split_factors(keys, values, layout)

    def _by_fisher(self, compression: float) -> bool:
        return compression > 0 and self.rank_allocation == "fisher"


def fisher_sensitivity(statistics: Statistics, num_layers: int) -> np.ndarray:
    """Root of the diagonal Fisher information, summed over each projection: ``[layers, 2]`` (K, V).

    Ranks are proportional to it (Palu, section 3.3; the root is in the published code). Without
    the root a few layers get nearly everything.
    """
    return np.stack([np.sqrt(statistics.fisher(i)).sum(axis=(1, 2)) for i in range(num_layers)])
