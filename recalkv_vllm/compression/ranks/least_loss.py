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

    Exact, by dynamic programming over the budget in steps of 16. Where losses are sums of squared
    singular values this is the greedy list over all layers: the next 16 elements go where the
    largest are.

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
    steps = budget // SPAN_MULTIPLE
    best = np.zeros(steps + 1)  # least loss of the layers so far within so many steps
    picked = np.zeros((len(layers), steps + 1), dtype=np.int32)
    for row, choices in zip(picked, layers, strict=True):
        after = np.full(steps + 1, np.inf)
        for i, choice in enumerate(choices):
            cost = choice.widths.rank // SPAN_MULTIPLE
            if cost <= steps:
                total = best[: steps + 1 - cost] + choice.loss
                better = total < after[cost:]
                after[cost:][better] = total[better]
                row[cost:][better] = i
        best = after
    chosen: list[Choice] = []
    for row, choices in zip(picked[::-1], layers[::-1], strict=True):
        chosen.append(choices[row[steps]])
        steps -= chosen[-1].widths.rank // SPAN_MULTIPLE
    return chosen[::-1]


def cheapest(choices: Sequence[Choice]) -> list[Choice]:
    """The choice of least loss for every rank that occurs."""
    best: dict[int, Choice] = {}
    for choice in choices:
        rank = choice.widths.rank
        if rank not in best or choice.loss < best[rank].loss:
            best[rank] = choice
    return [best[rank] for rank in sorted(best)]
