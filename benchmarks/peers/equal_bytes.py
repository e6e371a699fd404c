"""Losses at equal bytes, between measured points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

Point = tuple[float, float]


def front(points: Sequence[Point]) -> list[Point]:
    """Those (bytes, loss) that none beats in both, by ascending bytes and falling loss."""
    kept: list[Point] = []
    for size, loss in sorted(points):
        if not kept or loss < kept[-1][1]:
            kept.append((size, loss))
    return kept


def loss_at(points: Sequence[Point], size: float) -> float | None:
    """Loss of a way to cache in at most ``size`` bytes, on the line between its points.

    The line is straight in the logarithms of bytes and loss; where a loss is not positive, in loss
    itself. With more bytes than any point, that of the largest one, which fits; None with fewer
    than any.
    """
    kept = front(points)
    if not kept or size < kept[0][0]:
        return None
    for (a, loss_a), (b, loss_b) in itertools.pairwise(kept):
        if size <= b:
            part = math.log(size / a) / math.log(b / a)
            if loss_b > 0:
                return loss_a * (loss_b / loss_a) ** part
            return loss_a + part * (loss_b - loss_a)
    return kept[-1][1]


def best_peer(rows: Sequence[dict[str, Any]], size: float) -> tuple[str, float] | None:
    """The family of least loss in at most ``size`` bytes, and the loss; None if none is so small.

    Args:
        rows: of peers, with ``family``, ``bytes_per_token`` and ``loss``.
        size: bytes per token.
    """
    found = []
    for family in dict.fromkeys(row["family"] for row in rows):
        points = [(r["bytes_per_token"], r["loss"]) for r in rows if r["family"] == family]
        if (loss := loss_at(points, size)) is not None:
            found.append((loss, family))
    return min(found)[::-1] if found else None
