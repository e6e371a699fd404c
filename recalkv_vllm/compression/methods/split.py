"""What methods with disjoint key and value spans share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.factors import (
    LayerFactors,
    LayerInputs,
    reorder_rows,
    split_factors,
)
from recalkv_vllm.compression.methods.base import Method, MethodOptions, divisors
from recalkv_vllm.compression.ranks import LayerPlan, allocate_layers, check_compression
from recalkv_vllm.compression.statistics import InputStatistics, Statistics

#: Where the user names no group size: the paper's, or the largest divisor of h_kv below it.
LARGEST_AUTO_GROUP = 4


class SplitMethod(Method):
    """Keys and values are factored apart, every group on its own: spans are disjoint."""

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
        return {"fisher"} if compression > 0 and self.rank_allocation == "fisher" else set()

    def check(self, compression: float) -> None:
        check_compression(compression, self.geometry, self.k_group_size, self.v_groups)

    def plan(
        self,
        compression: float,
        layers: Sequence[LayerInputs],
        statistics: Statistics | None,
        latent_error: float = 0.0,
    ) -> list[LayerPlan]:
        geometry = self.geometry
        if compression == 0:
            k_width = self.k_group_size * geometry.head_dim
            v_width = geometry.num_kv_heads // self.v_groups * geometry.head_dim
            widths = [(k_width, v_width)] * geometry.num_layers
        else:
            sensitivity = np.ones((geometry.num_layers, 2))
            if self.rank_allocation == "fisher":
                assert statistics is not None
                sensitivity = fisher_sensitivity(statistics, geometry.num_layers)
            widths = allocate_layers(
                sensitivity, geometry, self.k_group_size, self.v_groups, compression
            )
        return [
            LayerPlan(self.head_order(inputs), *layer_widths)
            for inputs, layer_widths in zip(layers, widths, strict=True)
        ]

    def settings(self) -> dict[str, Any]:
        return {"k_group_size": self.k_group_size, "v_groups": self.v_groups}

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

    def factor(self, inputs: LayerInputs, plan: LayerPlan) -> LayerFactors:
        k_groups = self.geometry.num_kv_heads // self.k_group_size
        keys = [
            self.key_factors(weight, plan.k_width, inputs.statistics)
            for weight in reorder_rows(inputs.k_weight, plan.head_order).chunk(k_groups)
        ]
        values = [
            self.value_factors(weight, plan.v_width, inputs.statistics)
            for weight in reorder_rows(inputs.v_weight, plan.head_order).chunk(self.v_groups)
        ]
        return split_factors(keys, values, plan, self.k_group_size)


def fisher_sensitivity(statistics: Statistics, num_layers: int) -> np.ndarray:
    """Root of the diagonal Fisher information, summed over each projection: ``[layers, 2]`` (K, V).

    Ranks are proportional to it (Palu, section 3.3; the root is in the published code). Without
    the root a few layers get nearly everything.
    """
    return np.stack([np.sqrt(statistics.fisher(i)).sum(axis=(1, 2)) for i in range(num_layers)])
