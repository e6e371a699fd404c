"""Calls that are cut into pieces whatever their shapes, or not at all."""

from __future__ import annotations

import pytest

from recalkv_vllm.kernels import heuristics
from recalkv_vllm.kernels.pieces import MAX_WAVES, Bounds


def cut_into(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``pieces`` for each row block run at once; with one, nothing is cut."""

    def bounds(row_blocks: int, *_: object) -> Bounds | None:
        at_once = pieces * row_blocks
        return Bounds(MAX_WAVES * at_once, at_once) if pieces > 1 else None

    monkeypatch.setattr(heuristics, "piece_bounds", bounds)
