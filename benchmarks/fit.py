"""Constants of linear models that are to be right relative to what was counted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def least_relative_squares(
    found: Sequence[float], features: Sequence[Sequence[float]]
) -> list[float]:
    """Constants of least squared relative errors, none below zero: one for each feature."""
    counted = np.array(found)
    relative = np.array(features) / counted[:, None]
    kept = list(range(relative.shape[1]))
    while True:
        solved, *_ = np.linalg.lstsq(relative[:, kept], np.ones(len(counted)), rcond=None)
        if (solved >= 0).all():
            break
        del kept[int(solved.argmin())]
    constants = [0.0] * relative.shape[1]
    for i, value in zip(kept, solved, strict=True):
        constants[i] = float(value)
    return constants
