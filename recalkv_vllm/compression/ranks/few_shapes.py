"""Ways to store all layers that take few shapes: every shape is a kernel to compile.

Layers are first allocated freely. Shapes that occur, and those that occur with a little more or
less to spend, are then dropped one by one: always the one that layers would miss least, at the
prices that bytes and time have in the free allocation. What is left is allocated exactly.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

from recalkv_vllm.compression.ranks.two_budgets import LayerWays, allocate, least_priced

#: Distinct shapes of a model's layers, at most.
MOST_SHAPES = 6
#: Parts of the budget of bytes whose allocations show what shapes there might be.
PARTS = (0.8, 0.9, 0.97, 1.0, 1.1, 1.25)
#: The part whose allocation tells the price of bytes.
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
    found = allocate(layers, budget, most_time)
    if found is None:
        return None
    picked, time_price = found
    shapes = [candidates.shape(i, way) for i, way in enumerate(picked)]
    if len(set(shapes)) <= most:
        return Allocation(shapes, _loss(layers, picked))
    pool = dict.fromkeys(shapes)
    for part in PARTS:
        other = least_priced(layers, int(part * budget), time_price)
        if other is not None:
            pool |= dict.fromkeys(candidates.shape(i, way) for i, way in enumerate(other))
    byte_price = _byte_price(layers, budget, time_price)
    everything = list(pool)
    ways = candidates.at(everything)
    for _ in range(DOUBLINGS):
        kept = _missed_least(ways, byte_price, time_price, most)
        few = [LayerWays(w.costs[kept], w.losses[kept], w.times[kept]) for w in ways]
        left = allocate(few, budget, most_time)
        if left is not None:
            return Allocation([everything[kept[i]] for i in left[0]], _loss(few, left[0]))
        byte_price, time_price = 2 * byte_price, 2 * time_price
    return None


def _missed_least(
    ways: Sequence[LayerWays], byte_price: float, time_price: float, most: int
) -> list[int]:
    """Indices of shapes that are left when those that are missed least are dropped."""
    priced = np.stack([_priced(each, byte_price, time_price) for each in ways])
    kept = list(range(priced.shape[1]))
    while len(kept) > most:
        own = priced[:, kept]
        order = np.argsort(own, axis=1)
        rows = np.arange(len(own))
        first, second = own[rows, order[:, 0]], own[rows, order[:, 1]]
        missed = np.bincount(order[:, 0], weights=second - first, minlength=len(kept))
        del kept[int(missed.argmin())]
    return kept


def _priced(ways: LayerWays, byte_price: float, time_price: float) -> np.ndarray:
    timed = time_price * ways.times if time_price else 0.0
    return ways.losses + byte_price * ways.costs + timed


def _byte_price(layers: Sequence[LayerWays], budget: int, time_price: float) -> float:
    """Loss, and time at its price, for each step of bytes that is saved by having a little less."""
    totals, costs = [], []
    for part in (1.0, PRICED):
        picked = least_priced(layers, int(part * budget), time_price)
        if picked is None:
            return 0.0
        chosen = list(zip(layers, picked, strict=True))
        totals.append(sum(float(_priced(w, 0.0, time_price)[i]) for w, i in chosen))
        costs.append(sum(int(w.costs[i]) for w, i in chosen))
    return max(0.0, totals[1] - totals[0]) / max(1, costs[0] - costs[1])


def _loss(layers: Sequence[LayerWays], picked: Sequence[int]) -> float:
    return sum(float(layer.losses[i]) for layer, i in zip(layers, picked, strict=True))
