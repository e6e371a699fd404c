"""Offline value calibration: monotone, and as good as the whitened optimum."""

import pytest
import torch

from recalkv_vllm.compression.lowrank.linalg import relative_error, truncated_factors
from recalkv_vllm.compression.lowrank.value_calibration import calibrate_values, value_factors
from tests.compression.lowrank.test_linalg import random_metric


def problem(seed: int, n: int = 24, hidden: int = 40):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, hidden, generator=generator, dtype=torch.float64)
    return weight, random_metric(hidden, 80, generator)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rank", [1, 4, 23])
def test_no_iteration_raises_the_error(seed, rank):
    weight, metric = problem(seed)
    factors = truncated_factors(weight, rank)
    error = relative_error(weight, factors[0] @ factors[1], metric)
    for _ in range(10):
        factors = calibrate_values(weight, metric, factors, max_iterations=1)
        after = relative_error(weight, factors[0] @ factors[1], metric)
        assert after <= error * (1 + 1e-9)
        error = after


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rank", [1, 4, 12, 23])
def test_converges_to_the_whitened_optimum(seed, rank):
    weight, metric = problem(seed)
    up, down = value_factors(weight, rank, metric)
    best_up, best_down = truncated_factors(weight, rank, metric)
    error = relative_error(weight, up @ down, metric)
    assert error == pytest.approx(relative_error(weight, best_up @ best_down, metric), rel=5e-3)


def test_improves_on_plain_svd():
    weight, metric = problem(0)
    plain = truncated_factors(weight, 8)
    up, down = calibrate_values(weight, metric, plain)
    before = relative_error(weight, plain[0] @ plain[1], metric)
    assert relative_error(weight, up @ down, metric) < 0.8 * before


def test_twice_is_no_worse():
    weight, metric = problem(3)
    once = value_factors(weight, 8, metric)
    twice = calibrate_values(weight, metric, once)
    error = relative_error(weight, once[0] @ once[1], metric)
    assert relative_error(weight, twice[0] @ twice[1], metric) <= error * (1 + 1e-9)
    assert twice[0].shape == once[0].shape
    assert twice[1].shape == once[1].shape


def test_full_rank_stays_exact():
    weight, metric = problem(0, n=16)
    up, down = value_factors(weight, 16, metric)
    assert torch.equal(up @ down, weight)
