"""One way per layer: the least total of all that both budgets allow."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recalkv_vllm.compression.ranks.two_budgets import LayerWays, allocate

WAY = st.tuples(st.integers(1, 6), st.floats(0, 1e6), st.floats(0.1, 4))
LAYER = st.lists(WAY, min_size=1, max_size=4).map(
    lambda ways: LayerWays(*map(np.array, zip(*ways, strict=True)))
)
LAYERS = st.lists(LAYER, min_size=1, max_size=4)


def ways_of(found):
    """Without the price."""
    return None if found is None else found[0]


def spent(layers, picked):
    """Cost, loss and mean time of a choice."""
    of = [
        (ways.costs[i], ways.losses[i], ways.times[i])
        for ways, i in zip(layers, picked, strict=True)
    ]
    cost, loss, time = map(sum, zip(*of, strict=True))
    return cost, loss, time / len(layers)


def choices(layers, budget, most_time):
    """All that are within both budgets."""
    every = itertools.product(*(range(len(ways.costs)) for ways in layers))
    found = [spent(layers, picked) for picked in every]
    return [each for each in found if each[0] <= budget and each[2] <= most_time]


@settings(max_examples=200)
@given(layers=LAYERS, budget=st.integers(1, 24))
def test_nothing_within_the_budget_of_bytes_loses_less(layers, budget):
    picked = ways_of(allocate(layers, budget, math.inf))
    possible = choices(layers, budget, math.inf)
    if picked is None:
        assert not possible
        return
    cost, loss, _ = spent(layers, picked)
    assert cost <= budget
    assert loss == pytest.approx(min(each[1] for each in possible))


@settings(max_examples=200)
@given(layers=LAYERS, budget=st.integers(1, 24), most_time=st.floats(0.1, 4))
def test_no_choice_that_is_as_fast_and_small_loses_less(layers, budget, most_time):
    picked = ways_of(allocate(layers, budget, most_time))
    if picked is None:
        # What is within both may be missed only if there is none of the least possible time.
        fastest = min((each[2] for each in choices(layers, budget, math.inf)), default=math.inf)
        assert fastest > most_time * (1 - 1e-6)
        return
    cost, loss, time = spent(layers, picked)
    assert cost <= budget
    assert time <= most_time * (1 + 1e-9)
    for _, other, _ in choices(layers, cost, time):
        assert other >= loss * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_sums_of_squares_give_the_greedy_list(seed):
    """The next columns go where the largest squared singular values are."""
    rng = np.random.default_rng(seed)
    squares = -np.sort(-(rng.random((5, 6)) ** 4) * rng.random((5, 1)), axis=1)
    layers = [
        LayerWays(np.arange(1, 7), np.array([row[w:].sum() for w in range(1, 7)]), np.ones(6))
        for row in squares
    ]
    order = sorted(
        ((row[w], i) for i, row in enumerate(squares) for w in range(1, 6)), reverse=True
    )
    for budget in (5, 6, 12, 20, 30):
        greedy = [1] * 5
        for _, i in order[: budget - 5]:
            greedy[i] += 1
        picked = ways_of(allocate(layers, budget, math.inf))
        assert [int(layers[0].costs[i]) for i in picked] == greedy


def test_ways_that_no_kernel_runs_are_not_taken():
    ways = LayerWays(np.array([1, 1]), np.array([0.0, 5.0]), np.array([np.inf, 0.5]))
    assert ways_of(allocate([ways, ways], 2, 1.0)) == [1, 1]
    assert allocate([ways, ways], 2, 0.4) is None
    assert allocate([ways, ways], 2, math.inf) == ([0, 0], 0.0)
