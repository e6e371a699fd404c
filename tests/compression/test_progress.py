"""What is said about long work, and when: lines in a log, a bar on a terminal."""

import io
import sys
import time

import pytest
from rich.console import Console

from recalkv_vllm.compression import progress
from recalkv_vllm.compression.progress import Stage, duration, track


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves: ``clock[0]`` is now."""
    now = [100.0]
    monkeypatch.setattr(progress, "clock", lambda: now[0])
    return now


def on_a_terminal(monkeypatch, **options) -> str:
    """What a terminal gets of a stage."""
    # Here, as pytest puts its own in place between fixtures and a test.
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    assert Console(stderr=True).is_terminal
    for _ in track(range(3), "factoring", total=3, **options):
        pass
    return sys.stderr.getvalue()


def test_first_step_tells_nothing_about_time(clock):
    stage = Stage("calibrating", total=64, completed=3)
    assert stage.line() == "calibrating: 3 of 64"
    clock[0] += 50
    stage.step()
    assert stage.line() == "calibrating: 4 of 64"
    for _ in range(20):
        clock[0] += 2
        stage.step()
    assert stage.line() == "calibrating: 24 of 64, 80 seconds left"


def test_slow_steps_have_a_speed(clock):
    stage = Stage("measuring", total=4)
    for _ in range(3):
        clock[0] += 240
        stage.step()
    assert stage.line() == "measuring: 3 of 4, 4 minutes left"


def test_a_line_at_the_start_and_then_again_and_again(monkeypatch, caplog):
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.01)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.02)
    caplog.set_level("INFO")
    with Stage("healing", total=2) as stage:
        assert caplog.messages[0] == "healing: 0 of 2"
        stage.step()
        deadline = time.monotonic() + 60
        while len(caplog.messages) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
    said = list(caplog.messages)
    assert len(said) >= 5
    assert said[-1] == "healing: 1 of 2"
    time.sleep(0.1)
    assert caplog.messages == said


def test_short_work_takes_a_line(caplog):
    caplog.set_level("INFO")
    assert list(track("abc", "factoring", total=3)) == ["a", "b", "c"]
    assert caplog.messages == ["factoring: 0 of 3"]


def test_work_that_fails_ends_its_lines(caplog):
    caplog.set_level("INFO")
    stage = Stage("factoring", total=3)
    with pytest.raises(RuntimeError), stage:
        raise RuntimeError
    assert not stage._writer.is_alive()


@pytest.mark.parametrize("level", ["INFO", "WARNING"])
def test_a_terminal_gets_a_bar_unless_quiet(level, monkeypatch, caplog):
    caplog.set_level(level, progress.__name__)
    assert ("factoring" in on_a_terminal(monkeypatch)) == (level == "INFO")
    assert not caplog.messages


def test_measuring_is_not_disturbed_by_a_bar(monkeypatch, caplog):
    caplog.set_level("INFO")
    assert not on_a_terminal(monkeypatch, bar=False)
    assert caplog.messages == ["factoring: 0 of 3"]


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
