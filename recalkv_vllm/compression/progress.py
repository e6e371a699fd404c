"""Progress of long work: a bar on a terminal, else lines of the log. Neither above level INFO."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = logging.getLogger(__name__)
clock = time.monotonic

T = TypeVar("T")
#: Seconds from the line at a stage's start to the first that can say how long it takes,
FIRST_SECONDS = 3.0
#: and from each line to the next.
LINE_SECONDS = 30.0
#: Steps of the last so many seconds tell how fast it goes.
SPEED_SECONDS = 600.0


class Stage:
    """A stage of long work, as a context manager around it.

    Args:
        what: is done, as the line begins.
        total: calls of :meth:`step` in all, of about equal length.
        completed: those that need not be made.
        bar: whether a terminal gets a bar; drawing one takes time from what is being measured.
    """

    def __init__(self, what: str, total: int, completed: int = 0, *, bar: bool = True):
        self._what = what
        shown = log.isEnabledFor(logging.INFO)
        console = Console(stderr=True)
        draws = shown and bar and console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            get_time=clock,
            speed_estimate_period=SPEED_SECONDS,
            disable=not draws,
            transient=True,
        )
        self._task = self._progress.add_task(what, total=total, completed=completed)
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._writes = shown and not draws
        self._ended = threading.Event()

    def __enter__(self) -> Stage:
        self._progress.start()
        if self._writes:
            log.info(self.line())
            self._writer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._ended.set()
        if self._writes:
            self._writer.join()

    def step(self) -> None:
        """Note that a step is done."""
        self._progress.advance(self._task)

    def line(self) -> str:
        """Steps done and time left; the first step also warms up, and tells nothing about time."""
        (task,) = self._progress.tasks
        left = "" if (seconds := task.time_remaining) is None else f", {duration(seconds)} left"
        return f"{self._what}: {task.completed:.0f} of {task.total:.0f}{left}"

    def _write(self) -> None:
        seconds = FIRST_SECONDS
        while not self._ended.wait(seconds):
            log.info(self.line())
            seconds = LINE_SECONDS


def track(
    items: Iterable[T], what: str, *, total: int, completed: int = 0, bar: bool = True
) -> Iterator[T]:
    """Yield ``items``, each of them a step of a :class:`Stage`."""
    with Stage(what, total, completed, bar=bar) as stage:
        for item in items:
            yield item
            stage.step()


def duration(seconds: float) -> str:
    """``seconds`` for people, in the largest unit of which there are two at least."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
