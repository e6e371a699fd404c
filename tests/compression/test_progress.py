"""What is said about how long work takes, and when."""

import pytest

from recalkv_vllm.compression import progress
from recalkv_vllm.compression.progress import Forecast, duration


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves: ``clock[0]`` is now."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_forecast_is_made_once_from_the_first_seconds(clock, caplog):
    caplog.set_level("INFO")
    forecast = Forecast("calibration: 64 samples of 512 tokens", steps=60)
    clock[0] += 50
    forecast.step()
    for _ in range(59):
        clock[0] += 2
        forecast.step()
    assert caplog.messages == ["calibration: 64 samples of 512 tokens, about 2 minutes"]


def test_short_work_needs_no_forecast(clock, caplog):
    caplog.set_level("INFO")
    forecast = Forecast("work", steps=100)
    for _ in range(100):
        clock[0] += 0.02
        forecast.step()
    assert not caplog.messages


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (7.4, "7 seconds"),
        (119, "119 seconds"),
        (120, "2 minutes"),
        (7199, "120 minutes"),
        (7200, "2 hours"),
        (100_000, "28 hours"),
    ],
)
def test_duration(seconds, expected):
    assert duration(seconds) == expected
