"""Rank allocation: a budget of cached numbers split over projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recalkv_vllm.checkpoint import SPAN_MULTIPLE, AttentionGeometry, rank_budget
from recalkv_vllm.compression.errors import InputError


@dataclass(frozen=True, slots=True)
class Share:
    """One projection's claim on the budget.

    Args:
        weight: relative sensitivity; numbers are split in this proportion.
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


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Order of KV heads, and width of every K span and every V span, of one layer."""

    head_order: tuple[int, ...]
    k_width: int
    v_width: int


def allocate(shares: Sequence[Share], budget: int) -> list[int]:
    """Numbers per share: near-proportional to weight, in whole steps, never over ``budget``.

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
            f"the budget of {budget} cached numbers per token is less than the {steps.sum()} that "
            f"give each of {sum(s.groups for s in shares)} head groups a rank of {SPAN_MULTIPLE}"
        )
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
        raise InputError("rank allocation: expected finite, non-negative sensitivities, not all 0")

    target = _water_level(weights, steps, largest, budget)
    numbers = np.maximum(np.floor(target / steps + 1e-9).astype(int) * steps, steps)
    while True:
        left = budget - numbers.sum()
        fits = (steps <= left) & (numbers + steps <= largest)
        if not fits.any():
            return numbers.tolist()
        missing = np.where(fits, (target - numbers) / steps, -np.inf)
        best = int(missing.argmax())
        numbers[best] += steps[best]


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


def check_compression(
    compression: float, geometry: AttentionGeometry, k_group_size: int, v_groups: int
) -> None:
    """Raise :class:`InputError` unless every head group can get the least rank, or the full one.

    The message names what is possible: the largest compression, or a group size.
    """
    k_groups = geometry.num_kv_heads // k_group_size
    for kind, heads in (
        ("k-group-size", k_group_size),
        ("v-groups", geometry.num_kv_heads // v_groups),
    ):
        width = heads * geometry.head_dim
        if width < SPAN_MULTIPLE or (compression == 0 and width % SPAN_MULTIPLE):
            need = f"a multiple of {SPAN_MULTIPLE}" if compression == 0 else f">= {SPAN_MULTIPLE}"
            raise InputError(
                f"compression {compression}: a group of {heads} heads of {geometry.head_dim} is "
                f"{width} wide, expected {need}; choose another --{kind}"
            )
    check_budget(compression, geometry, f"{k_groups} K and {v_groups} V", k_groups + v_groups)


def check_budget(compression: float, geometry: AttentionGeometry, kinds: str, groups: int) -> None:
    """Raise :class:`InputError` unless each of ``groups`` latents per layer can get rank 16.

    ``kinds`` names them. The message names the largest possible compression.
    """
    budget = rank_budget(compression, geometry)
    least = geometry.num_layers * SPAN_MULTIPLE * groups
    if budget < least:
        dense = geometry.dense_width * geometry.num_layers
        # Rounded down to four digits: the number named must itself be accepted.
        possible = np.floor((1 - least / dense) * 1e4) / 1e4
        raise InputError(
            f"compression {compression}: leaves {budget} cached numbers per token, less than the "
            f"{least} of rank {SPAN_MULTIPLE} in each of {kinds} groups per layer; the largest "
            f"possible compression with these groups is {possible:g}"
        )


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
        compression: fraction of cached numbers to remove.

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
    numbers = allocate(shares, rank_budget(compression, geometry))
    return [
        (k // k_groups, v // v_groups) for k, v in zip(numbers[::2], numbers[1::2], strict=True)
    ]
