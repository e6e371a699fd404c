"""The page of supported features says what the tests show."""

import re

import pytest

from tests.e2e.features import PAGE, TABLE, TESTS, page


def test_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.e2e.features"


@pytest.mark.parametrize("test", sorted({test for row in TABLE for test in row.tests}))
def test_every_row_names_a_test(test):
    file, function = test.split("::")
    source = (TESTS / file).read_text(encoding="utf-8")
    assert re.search(rf"^def {function}\(", source, re.MULTILINE)


def test_what_needs_a_gpu_is_not_said_to_work():
    """CUDA graphs are replayed by hand here, with interpreted launches."""
    graphs = [row.state for row in TABLE if row.name.startswith("CUDA graphs of")]
    assert graphs == ["emulated"]
