"""Asynchronous work that a warp starts, commits in groups and waits for, of copies and products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Work = Callable[[], None]


@dataclass(slots=True)
class Groups:
    """Work is done when it is waited for, or ``early``, when it starts."""

    early: bool
    started: list[Work] = field(default_factory=list)  # since the last commit
    committed: list[list[Work]] = field(default_factory=list)

    def start(self, work: Work) -> None:
        if self.early:
            work()
        else:
            self.started.append(work)

    def take(self) -> list[Work]:
        """What was started since the last commit, for something else to wait for."""
        taken, self.started = self.started, []
        return taken

    def commit(self) -> None:
        self.committed.append(self.take())

    def wait(self, latest: int) -> None:
        """Until at most the ``latest`` groups are under way."""
        while len(self.committed) > latest:
            for work in self.committed.pop(0):
                work()

    @property
    def under_way(self) -> bool:
        return bool(self.started) or any(self.committed)
