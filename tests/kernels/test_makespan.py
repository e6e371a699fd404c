"""The table of what pieces win over equal splits."""

from __future__ import annotations

import pytest

from recalkv_vllm.benchmarks import makespan


def test_no_batch_takes_longer_in_pieces(capsys: pytest.CaptureFixture[str]) -> None:
    makespan.main()
    rows = [line.split("|")[2:5] for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == len(makespan.BATCHES)
    for equal, pieces, least in (map(int, row) for row in rows):
        assert least <= pieces <= equal
        assert pieces < 1.3 * least
