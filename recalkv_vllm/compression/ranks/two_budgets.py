"""One way for every layer: the least total loss within a budget of bytes and one of time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recalkv_vllm.compression.ranks.least_loss import least_total

#: The first price of time: as much for all that is allowed as this part of the largest losses.
#: It is raised by this factor until it is high enough, and then bisected.
FIRST_PRICE = 2.0**-20
RAISE = 8.0
RAISES = 30
BISECTIONS = 12
#: A choice that leaves no more than this part of the budget of time is good enough.
SLACK = 0.002


@dataclass(frozen=True, slots=True)
class LayerWays:
    """What the ways to store one layer cost, each an array over them.

    Args:
        costs: whole steps of the budget of bytes.
        losses: any unit that all layers share.
        times: as fractions of the dense layer's; infinite of ways that no kernel runs.
    """

    costs: np.ndarray
    losses: np.ndarray
    times: np.ndarray


def allocate(
    layers: Sequence[LayerWays], budget: int, most_time: float
) -> tuple[list[int], float] | None:
    """One way per layer, or None if no choice is within both budgets.

    Exact, by dynamic programming, where time does not matter. Else time has a price, the lowest at
    which the choice of least loss and price is fast enough: none that is as fast and as small as
    that choice loses less.

    Args:
        layers: what there is to choose from.
        budget: of steps over all layers.
        most_time: as fractions of the dense layer's, mean over all layers; may be infinite.

    Returns:
        Index of the way of each layer, and the price: loss for as much time as the dense layer's.
    """
    picked = least_priced(layers, budget, 0.0)
    if picked is None or _mean_time(layers, picked) <= most_time:
        return None if picked is None else (picked, 0.0)
    if sum(float(layer.times.min()) for layer in layers) > most_time * len(layers):
        return None
    losses = sum(float(layer.losses.max()) for layer in layers)
    high = max(losses, np.finfo(float).tiny) * FIRST_PRICE / (len(layers) * most_time)
    for _ in range(RAISES):
        picked = least_priced(layers, budget, high)
        if picked is None:
            return None
        if _mean_time(layers, picked) <= most_time:
            break
        high *= RAISE
    else:
        return None
    low = high / RAISE
    for _ in range(BISECTIONS):
        if _mean_time(layers, picked) >= (1 - SLACK) * most_time:
            break
        middle = math.sqrt(low * high)
        tried = least_priced(layers, budget, middle)
        if tried is not None and _mean_time(layers, tried) <= most_time:
            picked, high = tried, middle
        else:
            low = middle
    return picked, high


def _mean_time(layers: Sequence[LayerWays], picked: Sequence[int]) -> float:
    times = [float(layer.times[i]) for layer, i in zip(layers, picked, strict=True)]
    return sum(times) / len(times)


def least_priced(layers: Sequence[LayerWays], budget: int, price: float) -> list[int] | None:
    """Index of one way per layer: the least total of losses and priced times within the budget of
    bytes; None if none is within it.

    Args:
        layers: what there is to choose from.
        budget: of steps over all layers.
        price: of time; 0: it may be infinite.
    """
    kept, costs, values = [], [], []
    for layer in layers:
        priced = layer.losses + price * layer.times if price else layer.losses
        order = np.lexsort((priced, layer.costs))
        # Of more steps only what is better than all of fewer.
        chosen = order[priced[order] < np.minimum.accumulate(np.r_[np.inf, priced[order]])[:-1]]
        if not len(chosen):
            return None
        kept.append(chosen)
        costs.append(layer.costs[chosen].tolist())
        values.append(priced[chosen].tolist())
    if sum(map(min, costs)) > budget:
        return None
    picked = least_total(costs, values, budget)
    return [int(chosen[i]) for chosen, i in zip(kept, picked, strict=True)]
