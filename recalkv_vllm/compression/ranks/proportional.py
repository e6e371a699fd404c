"""Ranks in proportion to the sensitivity of each projection, within a budget of elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recalkv_vllm.checkpoint import SPAN_MULTIPLE, AttentionGeometry, rank_budget
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.ranks.reachable import check_compression


@dataclass(frozen=True, slots=True)
class Share:
    """One projection's claim on the budget.

    Args:
        weight: relative sensitivity; elements are split in this proportion.
        groups: head groups of the projection; its rank grows by 16 in each of them at a time.
        cap: the largest useful rank of one group.
    """

    weight: float
    groups: int
    cap: int

    @property
    def step(self) -> int:
        return SPAN_MULTIPLE * self.groups

    @property
    def largest(self) -> int:
        return self.cap // SPAN_MULTIPLE * self.step


def allocate(shares: Sequence[Share], budget: int) -> list[int]:
    """Elements per share: near-proportional to weight, in whole steps, never over ``budget``.

    Every share gets one step at least and its cap at most. What rounding down leaves is given out
    step by step where most is missing, until no step fits or all shares are full.

    Raises:
        InputError: the budget does not give every share one step.
    """
    steps = np.array([share.step for share in shares])
    largest = np.array([share.largest for share in shares])
    weights = np.array([share.weight for share in shares], dtype=np.float64)
    if budget < steps.sum():
        raise InputError(
            f"the budget of {budget} cached elements per token is less than the {steps.sum()} that "
            f"give each of {sum(s.groups for s in shares)} head groups a rank of {SPAN_MULTIPLE}"
        )
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
        raise InputError("rank allocation: expected finite, non-negative sensitivities, not all 0")

    target = _water_level(weights, steps, largest, budget)
    elements = np.maximum(np.floor(target / steps + 1e-9).astype(int) * steps, steps)
    while True:
        left = budget - elements.sum()
        fits = (steps <= left) & (elements + steps <= largest)
        if not fits.any():
            return elements.tolist()
        missing = np.where(fits, (target - elements) / steps, -np.inf)
        best = int(missing.argmax())
        elements[best] += steps[best]


def _water_level(
    weights: np.ndarray, lowest: np.ndarray, largest: np.ndarray, budget: int
) -> np.ndarray:
    """``clip(t · weight, lowest, largest)`` with the ``t`` that uses up the budget."""
    weights = weights / weights.max()
    weights[weights < 1e-9] = 0  # gets the least in any case, and keeps the bound below finite
    low, high = 0.0, float(largest.max() / weights[weights > 0].min())
    for _ in range(200):
        middle = (low + high) / 2
        if np.clip(middle * weights, lowest, largest).sum() > budget:
            high = middle
        else:
            low = middle
    return np.clip(low * weights, lowest, largest)


def allocate_layers(
    sensitivity: np.ndarray,
    geometry: AttentionGeometry,
    k_group_size: int,
    v_groups: int,
    compression: float,
) -> list[tuple[int, int]]:
    """Widths of all layers (K, V) for a compression, by sensitivity of each projection.

    Args:
        sensitivity: ``[layers, 2]`` (K, V).
        geometry: of the model.
        k_group_size: KV heads per K group.
        v_groups: V groups per layer.
        compression: fraction of cached elements to remove.

    Raises:
        InputError: too high a compression, or unusable sensitivities.
    """
    check_compression(compression, geometry, k_group_size, v_groups)
    heads, head_dim = geometry.num_kv_heads, geometry.head_dim
    k_groups = heads // k_group_size
    k_cap = min(k_group_size * head_dim, geometry.hidden_size)
    v_cap = min(heads // v_groups * head_dim, geometry.hidden_size)
    shares = [
        share
        for k_weight, v_weight in sensitivity
        for share in (Share(k_weight, k_groups, k_cap), Share(v_weight, v_groups, v_cap))
    ]
    elements = allocate(shares, rank_budget(compression, geometry))
    return [
        (k // k_groups, v // v_groups) for k, v in zip(elements[::2], elements[1::2], strict=True)
    ]
