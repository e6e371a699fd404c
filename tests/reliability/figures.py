"""What the tests of this folder counted; shown at the end of a run."""

from __future__ import annotations

from collections import defaultdict

#: Sums by name, in the order in which names were first counted.
FIGURES: defaultdict[str, float] = defaultdict(float)


def count(name: str, amount: float = 1) -> None:
    """Add to a figure; zero makes it appear."""
    FIGURES[name] += amount
