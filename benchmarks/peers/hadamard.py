"""Orthogonal matrices that spread a head's large elements over all others."""

from __future__ import annotations

import torch

from recalkv_vllm.compression.errors import InputError


def hadamard(size: int) -> torch.Tensor:
    """Sylvester's Hadamard matrix, made orthogonal: ``[size, size]``, equal to its transpose.

    Raises:
        InputError: ``size`` is not a power of two.
    """
    if size < 1 or size & (size - 1):
        raise InputError(
            f"head_dim: expected a power of two for a Hadamard matrix, found {size}; choose --rows "
            "without one"
        )
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / size**0.5


def random_rotation(size: int, generator: torch.Generator) -> torch.Tensor:
    """An orthogonal matrix drawn uniformly: ``[size, size]`` float32."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()
