"""Palu (arXiv 2407.21118): whitened SVD per group of heads for keys and values."""

from __future__ import annotations

import torch

from recalkv_vllm.compression.layer import InputStatistics
from recalkv_vllm.compression.lowrank.linalg import damped, truncated_factors
from recalkv_vllm.compression.methods.split import SplitMethod


class Palu(SplitMethod):
    """Group-head low-rank decomposition (sections 3.1 and 3.2), ranks by Fisher information."""

    name = "palu"
    allocations = ("fisher", "uniform")

    def default_v_groups(self) -> int:
        """Values are grouped as keys are."""
        return self.geometry.num_kv_heads // self.k_group_size

    def observers(self, compression: float) -> set[str]:
        return super().observers(compression) | ({"moments"} if compression > 0 else set())

    def key_factors(
        self, weight: torch.Tensor, rank: int, statistics: InputStatistics | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        metric = damped(statistics.second_moment) if statistics else None
        return truncated_factors(weight, rank, metric)

    value_factors = key_factors
