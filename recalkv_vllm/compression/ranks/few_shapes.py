"""Ways to store all layers that take few shapes: every shape is a kernel to compile.

Layers are first allocated freely. Shapes that occur, and those that occur with a little more or
less to spend, are then dropped one by one: always the one that layers would miss least, at the
prices that bytes and time have in the free allocation. What is left is allocated exactly.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

from recalkv_vllm.compression.ranks.two_budgets import LayerWays, allocate

#: Distinct shapes of a model's layers, at most.
MOST_SHAPES = 6
#: Parts of the budget of bytes whose allocations show what shapes there might be.
PARTS = (0.8, 0.9, 0.97, 1.0, 1.1, 1.25)
#: The part whose allocation tells prices.
PRICED = 0.97
#: How often prices are doubled until what is left is within both budgets.
DOUBLINGS = 8

Shape = TypeVar("Shape", bound=Hashable)


class Candidates(Protocol[Shape]):
    """What there is to choose from for all layers of a model."""

    @property
    def layers(self) -> Sequence[LayerWays]:
        """Ways of every layer's own."""

    def shape(self, layer: int, way: int) -> Shape:
        """Of one of them."""

    def at(self, shapes: Sequence[Shape]) -> list[LayerWays]:
        """What the same shapes cost every layer."""


class Allocation(Generic[Shape]):
    """Shapes of all layers.

    Args:
        shapes: one for each.
        loss: of all together.
    """

    __slots__ = ("loss", "shapes")

    def __init__(self, shapes: Sequence[Shape], loss: float):
        self.shapes, self.loss = list(shapes), loss


def allocate_few(
    candidates: Candidates[Shape], budget: int, most_time: float, most: int = MOST_SHAPES
) -> Allocation[Shape] | None:
    """The least loss that was found within both budgets and with up to ``most`` shapes.

    Args:
        candidates: to choose from.
        budget: see :func:`allocate`.
        most_time: see :func:`allocate`.
        most: distinct shapes.

    Returns:
        None if nothing is within both budgets.
    """
    layers = candidates.layers
    picked = allocate(layers, budget, most_time)
    if picked is None:
        return None
    shapes = [candidates.shape(i, way) for i, way in enumerate(picked)]
    if len(set(shapes)) <= most:
        return Allocation(shapes, _loss(layers, picked))
    prices = np.array(
        [
            _price(layers, budget, most_time, picked, int(PRICED * budget), most_time),
            _price(layers, budget, most_time, picked, budget, PRICED * most_time),
        ]
    )
    pool = dict.fromkeys(shapes)
    for part in PARTS:
        other = allocate(layers, int(part * budget), most_time)
        if other is not None:
            pool |= dict.fromkeys(candidates.shape(i, way) for i, way in enumerate(other))
    everything = list(pool)
    ways = candidates.at(everything)
    for _ in range(DOUBLINGS):
        kept = _missed_least(ways, prices, most)
        few = [LayerWays(w.costs[kept], w.losses[kept], w.times[kept]) for w in ways]
        found = allocate(few, budget, most_time)
        if found is not None:
            return Allocation([everything[kept[i]] for i in found], _loss(few, found))
        prices = 2 * np.maximum(prices, 1e-12 * _loss(layers, picked))
    return None


def _missed_least(ways: Sequence[LayerWays], prices: np.ndarray, most: int) -> list[int]:
    """Indices of shapes that are left when those that are missed least are dropped."""
    priced = np.stack(
        [w.losses + prices[0] * w.costs + (prices[1] * w.times if prices[1] else 0) for w in ways]
    )
    kept = list(range(priced.shape[1]))
    while len(kept) > most:
        own = priced[:, kept]
        order = np.argsort(own, axis=1)
        rows = np.arange(len(own))
        first, second = own[rows, order[:, 0]], own[rows, order[:, 1]]
        missed = np.bincount(order[:, 0], weights=second - first, minlength=len(kept))
        del kept[int(missed.argmin())]
    return kept


def _price(
    layers: Sequence[LayerWays],
    budget: int,
    most_time: float,
    picked: Sequence[int],
    less_budget: int,
    less_time: float,
) -> float:
    """Loss for each step of bytes, or part of a layer's time, that is saved by having less."""
    if math.isinf(most_time) and budget == less_budget:
        return 0.0
    other = allocate(layers, less_budget, less_time)
    if other is None:
        return 0.0
    lost = max(0.0, _loss(layers, other) - _loss(layers, picked))
    if budget != less_budget:
        return lost / (budget - less_budget)
    return lost / ((most_time - less_time) * len(layers))


def _loss(layers: Sequence[LayerWays], picked: Sequence[int]) -> float:
    return sum(float(layer.losses[i]) for layer, i in zip(layers, picked, strict=True))
