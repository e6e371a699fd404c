"""Which of several points nothing beats: the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence


def on_front(costs: Sequence[tuple[float, ...]]) -> list[bool]:
    """Of each point, whether no other costs as little in everything and less in something.

    Args:
        costs: of all points, in the same order of kinds; equal points do not beat one another.
    """
    return [not any(_beats(other, point) for other in costs) for point in costs]


def _beats(other: tuple[float, ...], point: tuple[float, ...]) -> bool:
    return other != point and all(a <= b for a, b in zip(other, point, strict=True))
