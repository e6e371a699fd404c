"""Optimality of the factors, against textbook formulas on random matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recalkv_vllm.compression.lowrank.linalg import damped, relative_error, truncated_factors


def random_metric(hidden: int, rank: int, generator: torch.Generator) -> torch.Tensor:
    """A second moment with a wide spectrum, like those of attention sinks."""
    x = torch.randn(rank, hidden, generator=generator, dtype=torch.float64)
    x *= torch.logspace(0, 3, rank, dtype=torch.float64)[:, None]
    return x.T @ x / rank


def symmetric_root(a: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(a)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


@settings(max_examples=30)
@given(n=st.integers(2, 40), hidden=st.integers(2, 40), seed=st.integers(0, 99), data=st.data())
def test_plain_factors_reach_the_eckart_young_error(n, hidden, seed, data):
    rank = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, hidden, generator=generator, dtype=torch.float64)
    up, down = truncated_factors(weight, rank)
    tail = torch.linalg.svdvals(weight)[rank:].square().sum()
    assert up.shape == (n, rank)
    assert down.shape == (rank, hidden)
    torch.testing.assert_close((weight - up @ down).square().sum(), tail, rtol=1e-8, atol=1e-9)


@settings(max_examples=30)
@given(n=st.integers(2, 24), seed=st.integers(0, 99), data=st.data())
def test_whitened_factors_reach_the_optimum(n, seed, data):
    hidden = 32
    rank = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, hidden, generator=generator, dtype=torch.float64)
    metric = random_metric(hidden, 48, generator)
    up, down = truncated_factors(weight, rank, metric)
    root = symmetric_root(metric)
    optimum = torch.linalg.svdvals(weight @ root)[rank:].square().sum()
    error = ((weight - up @ down) @ root).square().sum()
    scale = (weight @ root).square().sum()
    torch.testing.assert_close(error / scale, optimum / scale, rtol=1e-6, atol=1e-12)


def test_factors_equal_the_whitened_svd():
    """``[W A^½]_r A^{-½}``, the published form, is the same product."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(20, 32, generator=generator, dtype=torch.float64)
    metric = random_metric(32, 64, generator)
    root = symmetric_root(metric)
    u, s, vh = torch.linalg.svd(weight @ root, full_matrices=False)
    published = u[:, :7] * s[:7] @ vh[:7] @ torch.linalg.inv(root)
    up, down = truncated_factors(weight, 7, metric)
    torch.testing.assert_close(up @ down, published, rtol=1e-6, atol=1e-6)


def test_singular_metric():
    """Fewer tokens than dimensions: what they span is kept exactly, and all is finite."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(24, 32, generator=generator, dtype=torch.float64)
    metric = random_metric(32, 5, generator)
    up, down = truncated_factors(weight, 8, damped(metric))
    assert torch.isfinite(up).all()
    assert torch.isfinite(down).all()
    assert relative_error(weight, up @ down, metric) < 1e-4


def test_full_rank_is_exact():
    weight = torch.randn(16, 32, dtype=torch.float64)
    up, down = truncated_factors(weight, 16, random_metric(32, 40, torch.Generator()))
    assert torch.equal(up, torch.eye(16, dtype=torch.float64))
    assert torch.equal(down, weight)


@pytest.mark.parametrize("metric", [None, "tokens"])
def test_relative_error_is_that_of_outputs_on_tokens(metric):
    generator = torch.Generator().manual_seed(3)
    weight, product = torch.randn(2, 12, 20, generator=generator, dtype=torch.float64)
    tokens = torch.eye(20, dtype=torch.float64)
    if metric:
        tokens = torch.randn(50, 20, generator=generator, dtype=torch.float64)
    expected = (tokens @ (weight - product).T).norm() / (tokens @ weight.T).norm()
    moment = tokens.T @ tokens / len(tokens) if metric else None
    assert relative_error(weight, product, moment) == pytest.approx(float(expected), rel=1e-9)
