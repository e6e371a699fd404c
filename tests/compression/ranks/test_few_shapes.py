"""Few shapes for many layers: within both budgets, and little worse than as many as there are."""

import math

import numpy as np
import pytest

from recalkv_vllm.compression.ranks.few_shapes import allocate_few
from recalkv_vllm.compression.ranks.two_budgets import LayerWays, allocate


class Columns:
    """Layers whose shapes are numbers of columns; each layer's values fall at its own rate."""

    def __init__(self, count: int, seed: int):
        rng = np.random.default_rng(seed)
        self.columns = np.arange(1, 65)
        self.layers = [
            LayerWays(
                self.columns,
                scale * np.exp(-self.columns / rate),
                self.columns / 64,
            )
            for rate, scale in zip(rng.uniform(4, 20, count), rng.uniform(1, 5, count), strict=True)
        ]

    def shape(self, layer: int, way: int) -> int:
        return int(self.columns[way])

    def at(self, shapes):
        at = [int(np.flatnonzero(self.columns == shape)[0]) for shape in shapes]
        return [LayerWays(w.costs[at], w.losses[at], w.times[at]) for w in self.layers]


def spent(layers, columns):
    """Cost, loss and mean time."""
    ways = [
        (w.costs[c - 1], w.losses[c - 1], w.times[c - 1])
        for w, c in zip(layers, columns, strict=True)
    ]
    cost, loss, time = map(sum, zip(*ways, strict=True))
    return cost, loss, time / len(layers)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("most_time", [math.inf, 0.4])
def test_within_both_budgets_and_little_worse(seed, most_time):
    candidates, budget = Columns(30, seed), 30 * 28
    free, _ = allocate(candidates.layers, budget, most_time)
    assert len(set(free)) > 6
    found = allocate_few(candidates, budget, most_time)
    cost, loss, time = spent(candidates.layers, found.shapes)
    assert cost <= budget
    assert time <= most_time
    assert len(set(found.shapes)) <= 6
    assert found.loss == pytest.approx(loss)
    least = sum(candidates.layers[i].losses[way] for i, way in enumerate(free))
    assert least <= loss < 1.1 * least
    # As many shapes as layers cost nothing, and what is left of a budget is spent.
    many = allocate_few(candidates, budget, most_time, 30)
    cost, loss, time = spent(candidates.layers, many.shapes)
    assert cost <= budget
    assert time <= most_time
    assert many.loss == pytest.approx(loss)
    assert loss <= min(least, found.loss) * (1 + 1e-9)


def test_one_shape_for_all():
    candidates = Columns(4, 0)
    found = allocate_few(candidates, 4 * 20, math.inf, 1)
    (columns,) = set(found.shapes)
    assert columns <= 20


def test_what_is_within_no_budget():
    candidates = Columns(4, 0)
    assert allocate_few(candidates, 3, math.inf) is None
    assert allocate_few(candidates, 100, 0.01) is None
