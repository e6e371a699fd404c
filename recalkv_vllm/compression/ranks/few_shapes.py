"""Ways to store all layers that take few shapes: every shape is a kernel to compile.

Layers are first allocated freely. Shapes that occur, and those that occur with a little more or
less to spend, are then dropped one by one: always the one that layers would miss least, at the
prices that bytes and time have. Those that are left are exchanged for dropped ones while that
helps, and allocated exactly.
"""

from __future__ import annotations

import itertools
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
#: Prices of time, relative to that of the free allocation, that show more shapes.
TIME_FACTORS = (0.25, 1.0, 4.0)
#: Prices of time, relative to that of the free allocation, that shapes are chosen at: where many
#: choices cost nearly the same, those of fewer shapes jump from too slow to faster than need be.
PRICE_FACTORS = (0.5, 0.7, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 100.0)

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
        # With prices alone, part of a budget may be left.
        own = list(dict.fromkeys(shapes))
        ways = candidates.at(own)
        improved = _improved(ways, [own.index(shape) for shape in shapes], budget, most_time)
        return Allocation([own[i] for i in improved], _loss(ways, improved))
    pool = dict.fromkeys(shapes)
    for part, factor in itertools.product(PARTS, TIME_FACTORS if time_price else (1.0,)):
        other = least_priced(layers, int(part * budget), factor * time_price)
        if other is not None:
            pool |= dict.fromkeys(candidates.shape(i, way) for i, way in enumerate(other))
    everything = list(pool)
    ways = candidates.at(everything)
    best: Allocation[Shape] | None = None
    for price in [factor * time_price for factor in (PRICE_FACTORS if time_price else (1.0,))]:
        byte_price = _byte_price(layers, budget, price)
        kept = _exchanged(_priced_all(ways, byte_price, price), most)
        few = [LayerWays(w.costs[kept], w.losses[kept], w.times[kept]) for w in ways]
        left = allocate(few, budget, most_time)
        if left is None:
            continue
        improved = _improved(few, left[0], budget, most_time)
        loss = _loss(few, improved)
        if best is None or loss < best.loss:
            best = Allocation([everything[kept[i]] for i in improved], loss)
    return best


def _improved(
    layers: Sequence[LayerWays], picked: Sequence[int], budget: int, most_time: float
) -> list[int]:
    """The same, with ways of one layer or two at a time changed while that loses less.

    Prices of time leave part of its budget where ways are few and far apart.
    """
    now = list(picked)
    while True:
        chosen = list(zip(layers, now, strict=True))
        moves = [(layer, way) for layer, w in enumerate(layers) for way in range(len(w.costs))]
        owner = np.array([layer for layer, _ in moves])
        costs = np.concatenate([w.costs - w.costs[i] for w, i in chosen])
        losses = np.concatenate([w.losses - w.losses[i] for w, i in chosen])
        times = np.concatenate([w.times - w.times[i] for w, i in chosen])
        spare = budget - sum(int(w.costs[i]) for w, i in chosen)
        left = most_time * len(layers) - sum(float(w.times[i]) for w, i in chosen)
        # With the move that a layer's own way is, a pair is one move or none.
        fits = (costs[:, None] + costs <= spare) & (times[:, None] + times <= left)
        fits &= owner[:, None] != owner
        gains = np.where(fits, losses[:, None] + losses, 0.0)
        best = np.unravel_index(int(gains.argmin()), gains.shape)
        if gains[best] >= -1e-9 * _loss(layers, now):
            return now
        for move in best:
            layer, way = moves[int(move)]
            now[layer] = way


def _exchanged(priced: np.ndarray, most: int) -> list[int]:
    """Indices of up to ``most`` shapes of which each layer takes the best.

    Args:
        priced: ``[layers, shapes]``.
    """
    kept = _missed_least(priced, most)
    best = float(priced[:, kept].min(axis=1).sum())
    improved = True
    while improved:
        improved = False
        for place in range(len(kept)):
            others = kept[:place] + kept[place + 1 :]
            least = priced[:, others].min(axis=1) if others else np.full(len(priced), np.inf)
            totals = np.minimum(least[:, None], priced).sum(axis=0)
            if totals.min() < best * (1 - 1e-12):
                kept[place], best = int(totals.argmin()), float(totals.min())
                improved = True
    return kept


def _missed_least(priced: np.ndarray, most: int) -> list[int]:
    """Indices of shapes that are left when those that are missed least are dropped."""
    kept = list(range(priced.shape[1]))
    rows = np.arange(len(priced))
    while len(kept) > most:
        own = priced[:, kept]
        order = np.argsort(own, axis=1)
        first, second = own[rows, order[:, 0]], own[rows, order[:, 1]]
        missed = np.bincount(order[:, 0], weights=second - first, minlength=len(kept))
        del kept[int(missed.argmin())]
    return kept


def _priced_all(ways: Sequence[LayerWays], byte_price: float, time_price: float) -> np.ndarray:
    """``[layers, shapes]``: losses, bytes and time together."""
    return np.stack([_priced(each, byte_price, time_price) for each in ways])


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
