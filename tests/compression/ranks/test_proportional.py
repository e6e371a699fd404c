"""Budgets are met to the element, whatever the weights."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recalkv_vllm.checkpoint import AttentionGeometry, rank_budget
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.ranks.proportional import (
    Share,
    allocate,
    allocate_layers,
    check_compression,
)

SHARES = st.builds(
    Share,
    weight=st.floats(0, 1e6),
    groups=st.integers(1, 8),
    cap=st.integers(16, 512),
)


@settings(max_examples=200)
@given(shares=st.lists(SHARES, min_size=1, max_size=20), part=st.floats(0, 1))
def test_budget_is_used_up_and_never_exceeded(shares, part):
    if not any(share.weight for share in shares):
        shares.append(Share(1.0, 1, 64))
    least = sum(share.step for share in shares)
    most = sum(share.largest for share in shares)
    budget = int(least + part * (most - least))
    elements = allocate(shares, budget)
    assert sum(elements) <= budget
    for rank, share in zip(elements, shares, strict=True):
        assert rank % share.step == 0
        assert share.step <= rank <= share.largest
    left = budget - sum(elements)
    assert all(
        share.step > left or rank == share.largest
        for rank, share in zip(elements, shares, strict=True)
    )


def test_proportional_to_weight():
    shares = [Share(w, 1, 10_000) for w in (1.0, 2.0, 5.0)]
    assert allocate(shares, 16 * 80) == [160, 320, 800]


def test_what_a_full_share_leaves_goes_to_the_others():
    shares = [Share(100.0, 1, 64), Share(1.0, 1, 640), Share(1.0, 1, 640)]
    assert allocate(shares, 64 + 320) == [64, 160, 160]


@pytest.mark.parametrize("group_size", [1, 2, 4])
@pytest.mark.parametrize("compression", [0.1, 0.3, 0.5, 0.7, 0.8])
def test_compression_is_never_less_than_asked_for(group_size, compression):
    """Ranks in steps of 16, not 32, and rounded down: half of every head is kept, not 0.567."""
    geometry = AttentionGeometry(30, 576, 12, 4, 64)
    weights = np.random.default_rng(0).random((30, 2))
    layers = allocate_layers(weights, geometry, group_size, 1, compression)
    groups = 4 // group_size
    kept = sum(k_width * groups + v_width for k_width, v_width in layers)
    budget = rank_budget(compression, geometry)
    assert kept <= budget
    assert budget - kept < 16 * groups


def test_caps_by_hidden_size():
    geometry = AttentionGeometry(2, 64, 8, 8, 16)
    layers = allocate_layers(np.ones((2, 2)), geometry, 8, 1, 0.1)
    assert {k_width for k_width, _ in layers} == {64}


def test_too_high_a_compression_names_the_largest_possible():
    geometry = AttentionGeometry(30, 576, 9, 3, 64)
    with pytest.raises(InputError, match=r"largest possible compression .* is 0\.8333") as caught:
        allocate_layers(np.ones((30, 2)), geometry, 1, 1, 0.95)
    possible = float(str(caught.value).rsplit(" ", 1)[1])
    allocate_layers(np.ones((30, 2)), geometry, 1, 1, possible)


@pytest.mark.parametrize(
    ("head_dim", "compression", "message"),
    [(8, 0.5, "is 8 wide, expected >= 16"), (24, 0.0, "is 24 wide, expected a multiple of 16")],
)
def test_groups_that_no_span_fits(head_dim, compression, message):
    geometry = AttentionGeometry(2, 64, 4, 4, head_dim)
    with pytest.raises(InputError, match=f"{message}; choose another --k-group-size"):
        check_compression(compression, geometry, 1, 1)
    check_compression(compression, geometry, 4, 1)


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, float("nan")], [1.0, -1.0]])
def test_unusable_weights_are_refused(weights):
    with pytest.raises(InputError, match="sensitivities"):
        allocate([Share(w, 1, 64) for w in weights], 96)
