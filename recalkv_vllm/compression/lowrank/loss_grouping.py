"""Which KV heads share a group, by what grouping them loses."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

from recalkv_vllm.compression.lowrank.grouping import Grouping

#: A swap must lower the loss by more than this part of it: rounding must not swap for ever.
TOLERANCE = 1e-9


def improve_grouping(grouping: Grouping, loss: Callable[[tuple[int, ...]], float]) -> Grouping:
    """Make the best swap of two heads of different groups, as long as one lowers the total loss.

    Args:
        grouping: to start from.
        loss: of one group (heads ascending); called once per group that is looked at.

    Returns:
        Groups in the order of their first head, heads ascending inside each.
    """
    group_loss = cache(loss)
    groups = sorted(tuple(sorted(group)) for group in grouping)
    while True:
        best_gain, best_pair = TOLERANCE * sum(map(group_loss, groups)), None
        for (a, first), (b, second) in itertools.combinations(enumerate(groups), 2):
            before = group_loss(first) + group_loss(second)
            for i, j in itertools.product(first, second):
                pair = _replace(first, i, j), _replace(second, j, i)
                gain = before - sum(map(group_loss, pair))
                if gain > best_gain:
                    best_gain, best_pair = gain, {a: pair[0], b: pair[1]}
        if best_pair is None:
            return [list(group) for group in groups]
        groups = sorted(best_pair.get(i, group) for i, group in enumerate(groups))


def _replace(group: tuple[int, ...], old: int, new: int) -> tuple[int, ...]:
    return tuple(sorted(new if head == old else head for head in group))
