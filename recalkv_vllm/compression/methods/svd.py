"""Plain truncated SVD of the weights: the baseline that needs no calibration."""

from __future__ import annotations

import torch

from recalkv_vllm.compression.layer import InputStatistics
from recalkv_vllm.compression.lowrank.linalg import truncated_factors
from recalkv_vllm.compression.methods.split import SplitMethod


class Svd(SplitMethod):
    """Grouped SVD for keys in natural head order, joint SVD for values, uniform ranks."""

    name = "svd"
    allocations = ("uniform",)

    def key_factors(
        self, weight: torch.Tensor, rank: int, statistics: InputStatistics | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return truncated_factors(weight, rank)

    value_factors = key_factors
