"""Predicted decode time: limits of the roofline, and times that were measured."""

import pytest

from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.layer import nested_layout, split_layout
from recalkv_vllm.compression.plan import ModelPlan
from recalkv_vllm.compression.ranks.decode_time import RIDGES, relative_decode_time, ridge_of

LLAMA = AttentionGeometry(2, 4096, 32, 8, 128)


def split_plan(removed: float, v_groups: int) -> ModelPlan:
    """One K group per head of Llama-3.1-8B, and keys and values equally compressed."""
    kept = 1 - removed
    layout = split_layout(range(8), 1, v_groups, int(kept * 128), int(kept * 1024 / v_groups))
    return ModelPlan((layout,) * 2, "split")


@pytest.mark.parametrize(
    ("removed", "v_groups", "measured"),
    [(0.5, 8, 1.06), (0.75, 8, 0.60), (0.5, 1, 1.30), (0.75, 1, 0.71)],
)
def test_times_on_a_cpu_are_those_of_the_docs(removed, v_groups, measured):
    """docs/performance.md, the attention kernel."""
    predicted = relative_decode_time(split_plan(removed, v_groups), LLAMA, RIDGES["cpu"])
    assert predicted == pytest.approx(measured, rel=0.1)


def test_without_the_cost_of_arithmetic_time_is_bytes():
    assert relative_decode_time(split_plan(0.75, 8), LLAMA, 1e12) == pytest.approx(0.25)


def test_where_arithmetic_is_the_limit_bytes_do_not_matter():
    narrow, wide = (ModelPlan((nested_layout(range(8), 1, 64, w),) * 2, "nested") for w in (64, 65))
    dense = 4 * 32 * 128
    for plan, v_width in ((narrow, 64), (wide, 65)):
        flop = 2 * 64 * 8 * 128 + 2 * 32 * (128 + v_width)
        assert relative_decode_time(plan, LLAMA, 0.5) == pytest.approx(flop / dense)


def test_ridges():
    assert ridge_of("h100") == 200
    assert ridge_of("12.5") == 12.5
    assert ridge_of("none") == float("inf")
    with pytest.raises(InputError, match="target 'tpu': expected"):
        ridge_of("tpu")
