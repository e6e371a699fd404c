"""Losses beside those of a base model."""

import pytest

from recalkv_vllm.evaluation.perplexity import paired_error


def test_error_over_windows():
    base = [[1.0, 3.0], [5.0, 5.0], [2.0, 0.0]]
    losses = [[1.5, 3.5], [5.5, 5.5], [1.5, 0.5]]
    # Windows lose 0.5, 0.5 and 0: their variance is 1/12.
    assert paired_error(losses, base) == pytest.approx((1 / 12 / 3) ** 0.5)
    assert paired_error(base, base) == 0
    assert paired_error(losses[:1], base[:1]) is None
