"""Widths that are looked at."""

import pytest

from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.ranks.widths import candidate_widths, falling_steps

GEOMETRY = AttentionGeometry(2, 256, 8, 4, 32)


@pytest.mark.parametrize("spans", ["nested", "joint", "split"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_spans_of_candidates(spans, size):
    groups = 4 // size
    found = candidate_widths(spans, GEOMETRY, size, groups)
    assert len(set(found)) == len(found)
    for widths in found:
        assert widths.k_width % 16 == widths.v_width % 16 == 0
        assert widths.k_width > 0
        if spans == "split":
            assert widths.rank == groups * (widths.k_width + widths.v_width)
            assert widths.k_width <= size * 32
        else:
            assert widths.rank == groups * widths.v_width
            assert widths.k_width <= widths.v_width <= 2 * size * 32
        if spans == "joint":
            assert widths.k_width == widths.v_width
        if spans == "nested":
            assert widths.k_width <= size * 32  # more columns than keys have elements
    if spans == "nested":
        for width in {each.v_width for each in found}:
            own = {each.k_width for each in found if each.v_width == width}
            assert max(own) == min(width, size * 32)
            assert min(own) == 16


def test_falling_steps():
    assert falling_steps(0) == []
    assert falling_steps(1) == [1]
    assert falling_steps(32) == [1, 2, 3, 4, 6, 8, 11, 16, 23, 32]
