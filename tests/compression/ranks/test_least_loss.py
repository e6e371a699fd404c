"""Ranks by expected loss: the least total of all that the budget allows."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.ranks.least_loss import Choice, allocate_choices, cheapest
from recalkv_vllm.compression.ranks.targets import TARGETS, flop_per_byte
from recalkv_vllm.compression.ranks.widths import Widths, candidate_widths

LOSSES = st.floats(0, 1e6)
LAYER = st.lists(
    st.builds(
        Choice,
        widths=st.builds(lambda n: Widths(16 * n, 16, 16), st.integers(1, 6)),
        loss=LOSSES,
    ),
    min_size=1,
    max_size=4,
)


def total(choices):
    return sum(choice.loss for choice in choices), sum(choice.widths.rank for choice in choices)


@settings(max_examples=200)
@given(layers=st.lists(LAYER, min_size=1, max_size=4), budget=st.integers(16, 400))
def test_nothing_within_the_budget_loses_less(layers, budget):
    possible = [
        total(choices) for choices in itertools.product(*layers) if total(choices)[1] <= budget
    ]
    if not possible:
        with pytest.raises(InputError, match=f"budget of {budget}"):
            allocate_choices(layers, budget)
        return
    loss, rank = total(allocate_choices(layers, budget))
    assert rank <= budget
    assert loss == pytest.approx(min(possible)[0])


@pytest.mark.parametrize("seed", range(10))
def test_sums_of_squares_give_the_greedy_list(seed):
    """The next 16 elements go where the largest squared singular values are."""
    rng = np.random.default_rng(seed)
    squares = -np.sort(-(rng.random((5, 96)) ** 4) * rng.random((5, 1)), axis=1)
    layers = [
        [Choice(Widths(w, w, w), row[w:].sum()) for w in range(16, 97, 16)] for row in squares
    ]
    blocks = sorted(
        ((row[w : w + 16].sum(), i) for i, row in enumerate(squares) for w in range(16, 96, 16)),
        reverse=True,
    )
    for budget in (80, 96, 200, 320, 480):
        greedy = [16] * 5
        for _, i in blocks[: budget // 16 - 5]:
            greedy[i] += 16
        assert [choice.widths.rank for choice in allocate_choices(layers, budget)] == greedy


def test_losses_that_are_not_finite():
    with pytest.raises(InputError, match="not finite"):
        allocate_choices([[Choice(Widths(16, 16, 16), float("nan"))]], 32)


def test_cheapest_of_every_rank():
    choices = [
        Choice(Widths(r, k, 16), loss) for r, k, loss in ((32, 1, 3), (32, 2, 1), (48, 3, 5))
    ]
    assert [choice.widths.k_width for choice in cheapest(choices)] == [2, 3]


GEOMETRY = AttentionGeometry(2, 256, 8, 4, 32)


@pytest.mark.parametrize("spans", ["nested", "joint", "split"])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("budget", [8.0, 20.0, 64.0, float("inf")])
def test_widths_stay_within_the_reconstruction_budget(spans, size, budget):
    found = candidate_widths(spans, GEOMETRY, size, 4 // size, budget)
    if budget == float("inf"):
        assert found
    for widths in found:
        assert widths.k_width * 128 <= budget * widths.rank
        assert widths.k_width % 16 == widths.v_width % 16 == 0
        assert widths.k_width > 0
        groups = 4 // size
        if spans == "split":
            assert widths.rank == groups * (widths.k_width + widths.v_width)
            assert widths.k_width <= size * 32
        else:
            assert widths.rank == groups * widths.v_width
            assert widths.k_width <= widths.v_width <= 2 * size * 32
        if spans == "joint":
            assert widths.k_width == widths.v_width
            assert size * 32 <= budget
        if spans == "nested":  # and not one step less than is paid for
            more = widths.k_width + 16
            assert more > min(widths.v_width, size * 32) or more * 128 > budget * widths.rank


def test_targets():
    assert flop_per_byte("12.5") == 12.5
    assert flop_per_byte("none") == float("inf")
    # A joint latent over SmolLM2's three heads of 64 is for every GPU.
    assert all(TARGETS[name] >= 192 for name in ("h100", "a100"))
    for bad in ("b200", "0", "-1", "nan"):
        with pytest.raises(InputError, match=f"target '{bad}': expected auto, h100, a100"):
            flop_per_byte(bad)
