"""A contiguous range of a latent's columns: what one head group reads of it."""

from __future__ import annotations

from typing import NamedTuple


class Span(NamedTuple):
    """Columns ``[start, end)`` of a latent; equal to the plain pair ``(start, end)``."""

    start: int
    end: int

    @property
    def width(self) -> int:
        """Columns in it."""
        return self.end - self.start
