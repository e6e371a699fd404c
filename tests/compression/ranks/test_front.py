"""The Pareto front: what nothing beats."""

from hypothesis import given
from hypothesis import strategies as st

from recalkv_vllm.compression.ranks.front import on_front

COSTS = st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=1, max_size=20)


@given(COSTS)
def test_points_of_the_front_are_not_beaten_and_beat_all_others(costs):
    front = [cost for cost, best in zip(costs, on_front(costs), strict=True) if best]
    assert front
    for point in front:
        for other in costs:
            no_worse = all(a <= b for a, b in zip(other, point, strict=True))
            assert not no_worse or other == point
    for point in set(costs) - set(front):
        assert any(all(a <= b for a, b in zip(best, point, strict=True)) for best in front)


@given(COSTS)
def test_equal_points_share_their_fate(costs):
    fate = {}
    for cost, best in zip(costs, on_front(costs), strict=True):
        assert fate.setdefault(cost, best) == best
