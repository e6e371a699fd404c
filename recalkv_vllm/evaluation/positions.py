"""Loss against position: how far into a window a prediction is made."""

from __future__ import annotations

import math
from typing import Any

#: The first bucket has all positions below; every later one is twice as long as the one before it.
FIRST = 16


def by_position(losses: list[list[float]]) -> list[dict[str, Any]]:
    """Mean negative log-likelihood by the number of tokens before the predicted one.

    Args:
        losses: nats of each window's tokens but its first.

    Returns:
        A row for each bucket ``[start, end)`` of positions, in order: ``nll`` and the number of
        ``tokens``. Buckets end at powers of two, the last one at the windows' end.
    """
    rows = []
    longest = max(map(len, losses)) + 1
    start, end = 1, FIRST
    while start < longest:
        found = [nll for window in losses for nll in window[start - 1 : end - 1]]
        nll = math.fsum(found) / len(found)
        rows.append({"start": start, "end": min(end, longest), "nll": nll, "tokens": len(found)})
        start, end = end, 2 * end
    return rows
