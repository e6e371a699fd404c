"""Factors under metrics on input and output: nothing of the same shape loses less."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recalkv_vllm.compression.lowrank.linalg import output_moment
from recalkv_vllm.compression.lowrank.nested import nested_latent, nested_losses
from recalkv_vllm.compression.lowrank.two_sided import roots, two_sided_squares, two_sided_svd


def metric(size: int, generator: torch.Generator) -> torch.Tensor:
    """Positive definite, eigenvalues over four decades."""
    rows = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
    rows *= torch.logspace(0, 2, size, dtype=torch.float64)
    return rows.T @ rows / len(rows)


def problem(rows: int, hidden: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, hidden, generator=generator, dtype=torch.float64)
    return weight, metric(hidden, generator), metric(rows, generator), generator


def loss(change, inputs, outputs) -> float:
    return float(torch.trace(outputs @ change @ inputs @ change.T))


@settings(max_examples=30)
@given(rows=st.integers(2, 24), hidden=st.integers(2, 24), seed=st.integers(0, 99), data=st.data())
def test_no_other_factors_lose_less(rows, hidden, seed, data):
    weight, inputs, outputs, generator = problem(rows, hidden, seed)
    svd = two_sided_svd(weight, output_moment(weight, inputs), outputs)
    rank = data.draw(st.integers(1, min(rows, hidden)))
    up, down = svd.truncated(rank)
    best = loss(weight - up @ down, inputs, outputs)
    scale = loss(weight, inputs, outputs)
    assert best == pytest.approx(svd.losses(np.array([rank]))[0], abs=1e-9 * scale)
    # The optimum in closed form, by symmetric roots and a plain SVD.
    symmetric = [
        vectors @ torch.diag(values.sqrt()) @ vectors.T
        for values, vectors in map(torch.linalg.eigh, (outputs, inputs))
    ]
    singular = torch.linalg.svdvals(symmetric[0] @ weight @ symmetric[1])
    assert best == pytest.approx(float(singular[rank:].square().sum()), abs=1e-9 * scale)
    for size in (1e-3, 1e-1, 1.0):
        other_up = up + size * torch.randn(up.shape, generator=generator, dtype=torch.float64)
        other_down = down + size * torch.randn(down.shape, generator=generator, dtype=torch.float64)
        assert loss(weight - other_up @ other_down, inputs, outputs) >= best * (1 - 1e-9)


def test_squares_alone():
    weight, inputs, outputs, _ = problem(12, 20, 0)
    moment = weight @ inputs @ weight.T
    torch.testing.assert_close(
        two_sided_squares(moment, outputs),
        two_sided_svd(weight, output_moment(weight, inputs), outputs).squares,
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize(("rows", "hidden"), [(24, 32), (24, 16)])
def test_full_rank_reproduces_the_weight(rows, hidden):
    """Also with more rows than inputs: then the latent is a basis of the input itself."""
    weight, inputs, outputs, _ = problem(rows, hidden, 1)
    up, down = two_sided_svd(weight, output_moment(weight, inputs), outputs).truncated(
        min(rows, hidden)
    )
    torch.testing.assert_close(up @ down, weight, rtol=1e-8, atol=1e-8)


def test_roots_of_a_metric_that_rounding_made_indefinite():
    _, _, outputs, _ = problem(12, 20, 3)
    for smallest in (1.0, -1e-9):
        metric = outputs / outputs.norm()
        vectors = torch.linalg.eigh(metric)[1]
        metric = metric + (smallest - vectors[:, 0] @ metric @ vectors[:, 0]) * torch.outer(
            vectors[:, 0], vectors[:, 0]
        )
        half, inverse = roots(metric)
        torch.testing.assert_close(half.T @ half, metric, rtol=0, atol=1e-8)
        torch.testing.assert_close(
            half @ inverse, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-8
        )


def test_sides_of_the_latent_are_balanced():
    """Each column costs as much in the up factor as its row does in the down factor."""
    weight, inputs, outputs, _ = problem(16, 24, 2)
    svd = two_sided_svd(weight, output_moment(weight, inputs), outputs)
    up, down = svd.truncated(8)
    torch.testing.assert_close(
        (up.T @ outputs @ up).diagonal(), (down @ inputs @ down.T).diagonal(), rtol=1e-8, atol=0
    )


@settings(max_examples=30)
@given(seed=st.integers(0, 99), data=st.data())
def test_nested_latents_lose_what_they_say(seed, data):
    weight, inputs, outputs, _ = problem(32, 40, seed)
    svd = two_sided_svd(weight, output_moment(weight, inputs), outputs)
    width = data.draw(st.integers(1, 32))
    k_width = data.draw(st.integers(1, width))
    up, down = nested_latent(svd, outputs, k_width, width)
    assert up.shape == (32, width)
    assert down.shape == (width, 40)
    assert (up[:16, k_width:] == 0).all()
    expected = nested_losses(svd, outputs, np.array([k_width]), np.array([width]))[0]
    scale = loss(weight, inputs, outputs)
    assert loss(weight - up @ down, inputs, outputs) == pytest.approx(expected, abs=1e-9 * scale)
    if k_width >= min(width, 16):  # keys of 16 elements need 16 columns
        joint = svd.losses(np.array([width]))[0]
        assert expected == pytest.approx(joint, abs=1e-9 * scale)


@pytest.mark.parametrize("seed", range(5))
def test_no_rotation_and_no_values_lose_less(seed):
    """Of all nested factors with the same span of down rows, by the up factor's normal equations
    for random other rotations of the latent."""
    weight, inputs, outputs, generator = problem(32, 40, seed)
    svd = two_sided_svd(weight, output_moment(weight, inputs), outputs)
    k_width, width = 6, 20
    up, down = nested_latent(svd, outputs, k_width, width)
    best = loss(weight - up @ down, inputs, outputs)
    joint_up, joint_down = svd.truncated(width)
    for _ in range(20):
        square = torch.randn(width, width, generator=generator, dtype=torch.float64)
        rotation, _ = torch.linalg.qr(square)
        other_up, other_down = joint_up @ rotation, rotation.T @ joint_down
        other_up[:16, k_width:] = 0
        assert loss(weight - other_up @ other_down, inputs, outputs) > best
    for _ in range(20):  # other value rows, with these keys
        other = up.clone()
        other[16:] += 1e-3 * torch.randn(16, width, generator=generator, dtype=torch.float64)
        assert loss(weight - other @ down, inputs, outputs) > best


def test_interpolated_losses_are_close():
    """More ranks than are computed one by one."""
    weight, inputs, outputs, _ = problem(96, 128, 0)
    svd = two_sided_svd(weight, output_moment(weight, inputs), outputs)
    widths = np.arange(2, 90)
    k_widths = np.maximum(1, widths // 3)
    found = nested_losses(svd, outputs, k_widths, widths)
    exact = [
        nested_losses(svd, outputs, k_widths[i : i + 1], widths[i : i + 1])[0]
        for i in range(len(widths))
    ]
    np.testing.assert_allclose(found, exact, rtol=0.2)
