"""What a kernel spends on a cached token."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spent:
    """Per cached token, over all heads of a layer.

    Args:
        kernel: its name.
        tensor_flop: of matrix products, padding included.
        shared_bytes: read from and written to shared memory, matrix operands included.
        instructions: issued, of a warp each.
    """

    kernel: str
    tensor_flop: float
    shared_bytes: float
    instructions: float
