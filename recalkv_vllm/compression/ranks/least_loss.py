"""One choice for every layer: the least total loss within one budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def least_total(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int
) -> list[int]:
    """Index of one choice per layer: the least total loss at a total cost of at most ``budget``.

    Exact, by dynamic programming over the budget. The least costs together must be within it.
    """
    best = np.zeros(budget + 1)  # least loss of the layers so far at such a cost
    picked = np.zeros((len(costs), budget + 1), dtype=np.int32)
    for row, layer_costs, layer_losses in zip(picked, costs, losses, strict=True):
        after = np.full(budget + 1, np.inf)
        for i, (cost, loss) in enumerate(zip(layer_costs, layer_losses, strict=True)):
            if cost <= budget:
                total = best[: budget + 1 - cost] + loss
                better = total < after[cost:]
                after[cost:][better] = total[better]
                row[cost:][better] = i
        best = after
    chosen: list[int] = []
    for row, layer_costs in zip(picked[::-1], costs[::-1], strict=True):
        chosen.append(int(row[budget]))
        budget -= layer_costs[chosen[-1]]
    return chosen[::-1]
