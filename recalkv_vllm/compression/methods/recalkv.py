"""ReCalKV (arXiv 2505.24357): reordered key groups, calibrated joint values."""

from __future__ import annotations

import itertools

import torch

from recalkv_vllm.compression.layer import InputStatistics, LayerInputs
from recalkv_vllm.compression.lowrank.grouping import group_heads, head_similarity
from recalkv_vllm.compression.lowrank.linalg import damped, truncated_factors
from recalkv_vllm.compression.lowrank.value_calibration import value_factors
from recalkv_vllm.compression.methods.split import SplitMethod


class Recalkv(SplitMethod):
    """HSR and whitened grouped SVD for keys, OVC for values, ranks by Fisher information."""

    name = "recalkv"
    allocations = ("fisher", "uniform")

    @property
    def _reorders(self) -> bool:
        """Whether there is more than one way to group heads."""
        return self.allow_head_reordering and 1 < self.k_group_size < self.geometry.num_kv_heads

    def observers(self, compression: float) -> set[str]:
        needed = {"moments"} if compression > 0 or self._reorders else set()
        return super().observers(compression) | needed

    def head_order(self, inputs: LayerInputs) -> tuple[int, ...]:
        if not self._reorders:
            return super().head_order(inputs)
        assert inputs.statistics is not None
        similarity = head_similarity(
            inputs.k_weight,
            inputs.statistics.second_moment,
            inputs.statistics.mean,
            inputs.num_kv_heads,
        )
        return tuple(itertools.chain.from_iterable(group_heads(similarity, self.k_group_size)))

    def key_factors(
        self, weight: torch.Tensor, rank: int, statistics: InputStatistics | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        metric = damped(statistics.second_moment) if statistics else None
        return truncated_factors(weight, rank, metric)

    def value_factors(
        self, weight: torch.Tensor, rank: int, statistics: InputStatistics | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if statistics is None:
            return truncated_factors(weight, rank)
        return value_factors(weight, rank, damped(statistics.second_moment))
