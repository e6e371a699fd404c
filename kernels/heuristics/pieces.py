"""How many pieces the cached tokens of a call are cut into at most, on a device."""

from __future__ import annotations

from recalkv_vllm.kernels import pieces
from recalkv_vllm.kernels.heuristics.targets import Target


def piece_bounds(
    row_blocks: int, programs: int, target: Target, longest: int
) -> pieces.Bounds | None:
    """See :func:`recalkv_vllm.kernels.pieces.piece_bounds`: two programs to a multiprocessor."""
    return pieces.piece_bounds(row_blocks, programs, 2 * target.num_sms, longest)
