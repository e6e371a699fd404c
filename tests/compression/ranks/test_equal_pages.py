"""No layer takes more than its share, which loses less in the memory of pages that are padded."""

import math

import pytest

from recalkv_vllm.compression.ranks.equal_pages import EqualPages
from recalkv_vllm.compression.ranks.few_shapes import allocate_few
from tests.compression.ranks.test_few_shapes import Columns, spent


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("most_time", [math.inf, 0.4])
def test_less_loss_in_the_memory_of_padded_pages(seed, most_time):
    candidates = Columns(30, seed)
    free = allocate_few(candidates, 30 * 20, most_time)
    page = max(free.shapes)  # what each layer's page is padded to
    budget = 30 * page + 17
    equal = allocate_few(EqualPages(candidates, budget), budget, most_time)
    assert max(equal.shapes) <= page
    cost, loss, time = spent(candidates.layers, equal.shapes)
    assert cost <= budget
    assert time <= most_time
    assert equal.loss == pytest.approx(loss)
    assert loss <= free.loss
    if math.isinf(most_time):
        assert set(equal.shapes) == {page}
        assert loss < free.loss


def test_shares_that_are_too_small():
    candidates = Columns(4, 0)
    assert EqualPages(candidates, 4).possible
    assert not EqualPages(candidates, 3).possible
