"""Progress of long work: bars where stderr is a terminal, and how long all of it will take."""

from __future__ import annotations

import logging
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

T = TypeVar("T")
#: Seconds of work that a forecast is made from; shorter work needs none.
FORECAST_SECONDS = 3.0


def track(items: Iterable[T], description: str, *, total: int, completed: int = 0) -> Iterator[T]:
    """Yield ``items``, drawing a bar that starts at ``completed`` of ``total``."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as progress:
        task = progress.add_task(description, total=total, completed=completed)
        for item in items:
            yield item
            progress.advance(task)


class Forecast:
    """Logs once, after the first seconds of some work, how long all of it takes.

    Args:
        work: what is done, as the line begins.
        steps: calls of :meth:`step` in all, of about equal length.
    """

    def __init__(self, work: str, steps: int):
        self._work = work
        self._steps = steps
        self._done = 0
        self._began = 0.0
        self._logged = False

    def step(self) -> None:
        """Note that a step is done."""
        now = time.monotonic()
        if not self._done:
            self._began = now  # the first step also warms up: it is not like the others
        elapsed = now - self._began
        if not self._logged and elapsed >= FORECAST_SECONDS:
            self._logged = True
            log.info("%s, about %s", self._work, duration(elapsed / self._done * self._steps))
        self._done += 1


def duration(seconds: float) -> str:
    """``seconds`` for people, in the largest unit of which there are two at least."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
