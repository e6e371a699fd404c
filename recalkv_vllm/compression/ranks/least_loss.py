"""Ranks of all layers from one budget, by the expected loss that each choice leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recalkv_vllm.checkpoint import SPAN_MULTIPLE
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.ranks.widths import Widths


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to compress one layer, and its expected loss."""

    widths: Widths
    loss: float


def allocate_choices(layers: Sequence[Sequence[Choice]], budget: int) -> list[Choice]:
    """One choice per layer, of the least total loss within a budget.

    Where losses are sums of squared singular values this is the greedy list over all layers: the
    next 16 elements go where the largest are.

    Args:
        layers: the choices of each layer; all losses in one unit.
        budget: elements cached per token over all layers.

    Raises:
        InputError: no choices fit the budget, or losses are not finite.
    """
    least = sum(min(choice.widths.rank for choice in choices) for choices in layers)
    if budget < least:
        raise InputError(
            f"rank allocation: the budget of {budget} cached elements per token is less than the "
            f"{least} of the least ranks"
        )
    if not all(np.isfinite(choice.loss) for choices in layers for choice in choices):
        raise InputError("rank allocation: the expected losses of some ranks are not finite")
    costs = [[choice.widths.rank // SPAN_MULTIPLE for choice in choices] for choices in layers]
    losses = [[choice.loss for choice in choices] for choices in layers]
    picked = least_total(costs, losses, budget // SPAN_MULTIPLE)
    return [choices[i] for choices, i in zip(layers, picked, strict=True)]


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


def cheapest(choices: Sequence[Choice]) -> list[Choice]:
    """The choice of least loss for every rank that occurs."""
    best: dict[int, Choice] = {}
    for choice in choices:
        rank = choice.widths.rank
        if rank not in best or choice.loss < best[rank].loss:
            best[rank] = choice
    return [best[rank] for rank in sorted(best)]
