"""What a platform's side of the kernel benchmark hands over to be timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Runs:
    """Functions to time. Each attends ``calls`` times, every time another layer's cache.

    Args:
        kernel: the version of ours that runs.
        ours: to head outputs, as stock's attention gives.
        stock: baselines by name; the fastest counts.
    """

    kernel: str
    calls: int
    ours: Callable[[], object]
    stock: Mapping[str, Callable[[], object]]
    reference: Callable[[], object]
