"""Calls with rows that belong to no sequence, which every version must clear."""

from __future__ import annotations

from typing import Any

import torch

from tests.ops.cases import MAX_POSITION, AttentionCase, AttentionInputs, build, spanned

#: ``(queries, cached tokens)`` of each sequence, rows of none, hints.
PADDED_CALLS: dict[str, tuple[tuple[tuple[int, int], ...], int, dict[str, Any]]] = {
    "unhinted": (((1, 45), (3, 50), (0, 0), (20, 20)), 3, {}),
    "no-more-than-one-block": (((1, 300), (0, 0)), 5, {}),
    "decode": (((1, 45), (1, 177), (0, 0), (0, 0)), 2, {"num_decodes": 4, "num_decode_tokens": 4}),
    # Captured for a batch whose requests all are padding when the graph is replayed.
    "nothing": (((0, 0), (0, 0)), 2, {"num_decodes": 2, "num_decode_tokens": 2}),
    # A padded request between others, as no runner makes them.
    "gap": (((1, 45), (0, 0), (1, 300)), 1, {"num_decodes": 3, "num_decode_tokens": 3}),
    "verification": (
        ((4, 45), (2, 300), (1, 1), (0, 0)),
        9,
        {"num_decodes": 4, "num_decode_tokens": 16, "max_decode_query_len": 4},
    ),
    # More rows than the decodes have places for.
    "more-than-places": (((1, 45), (1, 20)), 7, {"num_decodes": 2, "num_decode_tokens": 9}),
    "after-the-hint": (((1, 45), (1, 20)), 7, {"num_decodes": 2, "num_decode_tokens": 2}),
    "prefill-after-decodes": (
        ((1, 45), (1, 20), (33, 33), (7, 90)),
        6,
        {"num_decodes": 2, "num_decode_tokens": 2},
    ),
}


def padded_call(
    name: str, dtype: torch.dtype, device: str
) -> tuple[AttentionCase, AttentionInputs]:
    """The call ``name``, and its inputs."""
    batch, rows, hints = PADDED_CALLS[name]
    case = spanned(name, (8, 2, 64), 1, 48, 2, 32, batch=batch, padding_rows=rows)
    return case, build(case, dtype, device).change(max_seq_len=MAX_POSITION, **hints)
