"""Some mixed load on a small model; minutes of it on a real one where asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.reliability.figures import count
from tests.reliability.soak import run

SECONDS = os.environ.get("RECALKV_SOAK_SECONDS")
#: Without the variable: so many requests, however long they take a busy machine.
SHORT_SECONDS, SHORT_REQUESTS = 600, 240
#: Allocators keep what a peak needed; a leak grows with the requests and passes this in minutes.
RSS_GROWTH_MB = 96

#: An idle machine takes minutes for a short one, too.
pytestmark = [] if SECONDS else [pytest.mark.slow]


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Path:
    """The real model at half its cache for a long soak, else a random one."""
    if SECONDS:
        return request.getfixturevalue("half")
    small, compressed = map(request.getfixturevalue, ("small", "compressed"))
    return compressed(small, compression=0.5)


def test_soak(served: Path, tmp_path: Path) -> None:
    bounds = (float(SECONDS), None) if SECONDS else (SHORT_SECONDS, SHORT_REQUESTS)
    report = run(served, bounds[0], tmp_path / "log", requests=bounds[1])
    for name, figure in (
        ("requests sent", report.requests),
        ("requests served", report.served),
        ("requests refused", report.refused),
        ("aborts", report.aborted),
        ("preemptions", report.preemptions),
        ("probes compared", report.probes),
        ("wrong answers", report.wrong_answers),
        ("blocks leaked", report.leaked_blocks),
        ("resident memory (MB)", report.rss_mb),
        ("RSS growth (MB)", report.rss_growth_mb),
        ("soak (seconds)", report.seconds),
    ):
        count(name, figure)
    assert not report.unexpected, "\n".join(report.unexpected)
    assert not report.complaints, "\n".join(report.complaints)
    assert report.wrong_answers == 0
    assert report.leaked_blocks == 0
    assert report.rss_growth_mb < RSS_GROWTH_MB
    # It did what it is for.
    assert min(report.served, report.refused, report.aborted, report.probes) > 10
    assert report.preemptions > 0
    assert report.prefix_cache_hits > 0
