"""Muon, the optimizer of healing (Jordan et al., https://kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

MOMENTUM = 0.95
#: Of the polynomial ``a·s + b·s³ + c·s⁵`` that brings singular values from 0.001 … 1 near to 1 in
#: five rounds.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


class Muon:
    """Momentum of which all directions are made equally large.

    A window of text has large gradients in few directions of a matrix. This makes steps in all of
    them, and so gets further in few steps than AdamW does.

    Args:
        parameters: ``[..., m, n]``; leading dimensions are of matrices of their own.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self._parameters = parameters
        #: Of every parameter.
        self.momenta = [torch.zeros_like(parameter.data) for parameter in parameters]

    def clear_gradients(self) -> None:
        """Before a backward pass."""
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Move all parameters by their gradients.

        Args:
            learning_rate: root mean square of the elements of a step, about.
        """
        for parameter, momentum in zip(self._parameters, self.momenta, strict=True):
            assert parameter.grad is not None
            momentum.lerp_(parameter.grad, 1 - MOMENTUM)
            direction = orthogonalized(parameter.grad.lerp(momentum, MOMENTUM))
            size = learning_rate * math.sqrt(max(parameter.shape[-2:]))
            parameter.add_(direction.to(parameter.dtype), alpha=-size)


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """``[..., m, n]`` with the same singular vectors, and singular values near 1; bfloat16."""
    x = matrix.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    if not wide:
        x = x.mT
    tiny = torch.finfo(torch.bfloat16).tiny
    x = x / torch.linalg.matrix_norm(x.float(), keepdim=True).clamp_min(tiny).bfloat16()
    a, b, c = NEWTON_SCHULZ
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT
