"""One way for every layer: the least total loss within a budget of bytes and one of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recalkv_vllm.compression.ranks.least_loss import least_total

#: The first price of time: as much for all that is allowed as this part of the largest losses.
#: It is doubled until it is high enough; then the prices between it and half of it are bisected.
FIRST_PRICE = 2.0**-20
DOUBLINGS = 60
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


def allocate(layers: Sequence[LayerWays], budget: int, most_time: float) -> list[int] | None:
    """Index of one way per layer, or None if no choice is within both budgets.

    Exact, by dynamic programming, where time does not matter. Else time has a price, the lowest at
    which the choice of least loss and price is fast enough: none that is as fast and as small as
    that choice loses less.

    Args:
        layers: what there is to choose from.
        budget: of steps over all layers.
        most_time: as fractions of the dense layer's, mean over all layers; may be infinite.
    """
    picked = _least(layers, budget, 0.0)
    if picked is None or _mean_time(layers, picked) <= most_time:
        return picked
    losses = sum(float(layer.losses.max()) for layer in layers)
    low, high = 0.0, max(losses, np.finfo(float).tiny) * FIRST_PRICE / (len(layers) * most_time)
    for _ in range(DOUBLINGS):
        picked = _least(layers, budget, high)
        if picked is None or _mean_time(layers, picked) <= most_time:
            break
        low, high = high, 2 * high
    else:
        return None
    for _ in range(BISECTIONS):
        if picked is None or _mean_time(layers, picked) >= (1 - SLACK) * most_time:
            break
        middle = (low + high) / 2
        tried = _least(layers, budget, middle)
        if tried is not None and _mean_time(layers, tried) <= most_time:
            picked, high = tried, middle
        else:
            low = middle
    return picked


def _mean_time(layers: Sequence[LayerWays], picked: Sequence[int]) -> float:
    times = [float(layer.times[i]) for layer, i in zip(layers, picked, strict=True)]
    return sum(times) / len(times)


def _least(layers: Sequence[LayerWays], budget: int, price: float) -> list[int] | None:
    """Index of one way per layer: the least total of losses and priced times within the budget of
    bytes; None if none is within it."""
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
