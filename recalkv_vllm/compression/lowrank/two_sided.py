"""Low-rank factors of a projection under a metric on its input and one on its output."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

#: Eigenvalues below this part of the largest are rounding errors of float64.
FLOOR = 1e-14


@dataclass(frozen=True, slots=True)
class TwoSidedSvd:
    """The SVD of ``G^{1/2} W A^{1/2} = U S Vᵀ``, mapped back to ``W``.

    Args:
        squares: squared singular values, descending: what each direction's loss would cost.
        up: ``G^{-1/2} U S^{1/2}: [n, n]``.
        down: ``S^{1/2} Vᵀ A^{-1/2}: [n, H]``. ``√S`` on both sides gives factors and latents of a
            like size in all directions.
    """

    squares: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def losses(self, ranks: np.ndarray) -> np.ndarray:
        """``tr(G (W - L R) A (W - L R)ᵀ)`` of the best factors of each rank."""
        tails = self.squares.flip(0).cumsum(0).flip(0)
        return torch.cat((tails, tails.new_zeros(1)))[torch.from_numpy(ranks)].numpy()

    def noise(self, ranks: np.ndarray) -> np.ndarray:
        """What a relative error of 1 in the rotated latent would cost: ``(Σ s)² / rank``."""
        sums = self.squares.sqrt().cumsum(0)[torch.from_numpy(ranks) - 1]
        return sums.square().numpy() / ranks

    def truncated(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``L: [n, rank]`` and ``R: [rank, H]``."""
        return self.up[:, :rank], self.down[:rank]


def two_sided_svd(
    weight: torch.Tensor, moment: torch.Tensor, output_metric: torch.Tensor
) -> TwoSidedSvd:
    """Best factors of every rank at once: ``argmin tr(G (W - L R) A (W - L R)ᵀ)``.

    The left singular vectors are the eigenvectors of ``G^{1/2} W A Wᵀ G^{1/2}``, and with them
    ``L R = G^{-1/2} U Uᵀ G^{1/2} W``: no root or inverse of ``A`` is taken, so it may be singular.

    Args:
        weight: ``W: [n, H]`` float64.
        moment: ``W A Wᵀ: [n, n]`` of the positive semidefinite ``A``.
        output_metric: ``G: [n, n]``, positive definite.
    """
    half, inverse = roots(output_metric)
    whitened = half @ moment @ half.T
    squares, vectors = torch.linalg.eigh((whitened + whitened.T) / 2)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    balance = squares.clamp(min=FLOOR * float(squares[0])).pow(0.25)
    return TwoSidedSvd(
        squares=squares,
        up=inverse @ vectors * balance,
        down=(vectors.T @ (half @ weight)) / balance[:, None],
    )


def two_sided_squares(moment: torch.Tensor, output_metric: torch.Tensor) -> torch.Tensor:
    """Only the squared singular values, descending, from ``W A Wᵀ: [n, n]`` and ``G: [n, n]``."""
    half, _ = roots(output_metric)
    return torch.linalg.eigvalsh(half @ moment @ half.T).flip(0).clamp(min=0)


def roots(metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``H`` with ``Hᵀ H = G``, and its inverse."""
    lower, failed = torch.linalg.cholesky_ex(metric)
    if failed:  # rounding made it indefinite
        values, basis = torch.linalg.eigh(metric)
        scale = values.clamp(min=FLOOR * float(values[-1])).sqrt()
        return (basis * scale).T, basis / scale
    eye = torch.eye(len(metric), dtype=metric.dtype)
    return lower.T, torch.linalg.solve_triangular(lower.T, eye, upper=True)
