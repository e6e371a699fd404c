"""Latents in regions: exact at full width, and what is dropped adds up to what is expected."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recalkv_vllm.compression.lowrank.linalg import output_moment
from recalkv_vllm.compression.lowrank.regions import GroupLatent, stack_regions
from recalkv_vllm.compression.lowrank.two_sided import two_sided_svd
from tests.compression.lowrank.test_two_sided import loss, problem


@settings(max_examples=30)
@given(seed=st.integers(0, 99), data=st.data())
def test_losses_of_regions_add_up(seed, data):
    weight, inputs, outputs, _ = problem(32, 40, seed)
    svd = two_sided_svd(weight, output_moment(weight, inputs), outputs)
    k_width = data.draw(st.integers(1, 31))
    nested = GroupLatent(svd, outputs, 32).regions(k_width)
    assert [len(region.squares) for region in nested.regions] == [k_width, 32 - k_width]
    kept = [
        data.draw(st.integers(0 if i else 1, len(r.squares))) for i, r in enumerate(nested.regions)
    ]
    up, down = stack_regions(nested.regions, kept)
    assert up.shape == (32, sum(kept))
    assert (up[:16, kept[0] :] == 0).all()
    expected = nested.dropped + sum(
        float(region.squares[width:].sum())
        for region, width in zip(nested.regions, kept, strict=True)
    )
    scale = loss(weight, inputs, outputs)
    assert loss(weight - up @ down, inputs, outputs) == pytest.approx(expected, abs=1e-9 * scale)
    for region in nested.regions:
        assert (region.squares.diff() <= 1e-12 * scale).all()


@settings(max_examples=20)
@given(seed=st.integers(0, 99), k_width=st.integers(16, 31))
def test_keys_that_have_the_columns_they_need_lose_nothing(seed, k_width):
    weight, inputs, outputs, _ = problem(32, 40, seed)
    nested = GroupLatent(
        two_sided_svd(weight, output_moment(weight, inputs), outputs), outputs, 32
    ).regions(k_width)
    scale = loss(weight, inputs, outputs)
    assert nested.dropped == pytest.approx(0, abs=1e-9 * scale)
    up, down = stack_regions(nested.regions, (k_width, 32 - k_width))
    torch.testing.assert_close(up @ down, weight, rtol=1e-6, atol=1e-6)


def test_columns_of_a_region_are_uncorrelated_and_balanced():
    """Dropping or distorting one costs the same whatever happens to the others."""
    weight, inputs, outputs, _ = problem(32, 40, 3)
    nested = GroupLatent(
        two_sided_svd(weight, output_moment(weight, inputs), outputs), outputs, 32
    ).regions(12)
    for region in nested.regions:
        kept = int((region.squares > 1e-9 * region.squares[0]).sum())
        assert kept >= 12
        up, down = region.truncated(kept)
        values = region.squares[:kept].sqrt()
        torch.testing.assert_close(up.T @ outputs @ up, values.diag(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(down @ inputs @ down.T, values.diag(), rtol=1e-6, atol=1e-6)


def test_a_joint_latent_is_one_region():
    weight, inputs, outputs, _ = problem(32, 40, 3)
    svd = two_sided_svd(weight, output_moment(weight, inputs), outputs)
    joint = GroupLatent(svd, outputs, 32).regions(None)
    assert joint.regions == (svd,)
    assert joint.dropped == 0


@pytest.mark.parametrize("k_width", [None, 1, 12, 31])
def test_squares_alone(k_width):
    weight, inputs, outputs, _ = problem(32, 40, 3)
    latent = GroupLatent(two_sided_svd(weight, output_moment(weight, inputs), outputs), outputs, 32)
    squares, dropped = latent.squares(k_width)
    largest = float(squares[0][0])
    nested = latent.regions(k_width)
    assert dropped == nested.dropped
    for found, region in zip(squares, nested.regions, strict=True):
        torch.testing.assert_close(found, region.squares, rtol=1e-9, atol=1e-12 * largest)
