"""Low-rank factors of a projection under a metric on its input."""

from __future__ import annotations

import torch

#: Added to a second moment's diagonal, relative to its mean eigenvalue: directions that the
#: calibration text never used still count a little, and a singular moment has one optimum.
DAMPING = 1e-6
#: The same for second moments of loss gradients.
GRADIENT_DAMPING = 1e-3


def damped(second_moment: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """``A + ε·mean(λ)·I`` for ``A: [H, H]``."""
    mean_eigenvalue = second_moment.diagonal().mean()
    eye = torch.eye(len(second_moment), dtype=second_moment.dtype, device=second_moment.device)
    return second_moment + damping * mean_eigenvalue * eye


def output_moment(weight: torch.Tensor, metric: torch.Tensor | None) -> torch.Tensor:
    """``W A Wᵀ: [n, n]``, the second moment of the outputs of ``weight: [n, H]``.

    ``metric: [H, H]`` is ``A``; the identity if not given.
    """
    moment = weight @ (weight.T if metric is None else metric @ weight.T)
    return (moment + moment.T) / 2


def truncated_factors(
    weight: torch.Tensor, rank: int, metric: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best factors of a rank: ``argmin ‖(W - L R) A^{1/2}‖_F``, ``L`` with orthonormal columns.

    This is the whitened SVD (``L R = [W A^{1/2}]_r A^{-1/2}``; Palu, section 3.1, SVD-LLM) without
    the whitening: the left singular vectors of ``W A^{1/2}`` are the eigenvectors of ``W A Wᵀ``,
    and with them ``L R = U Uᵀ W``. No root or inverse of ``A`` is taken, so it may be singular.

    Args:
        weight: ``[n, H]`` float64.
        rank: at most ``n``; at ``n`` the factors are exact (``L`` is the identity).
        metric: ``A: [H, H]``; the identity (plain SVD) if not given.

    Returns:
        ``L: [n, rank]`` and ``R: [rank, H]``.
    """
    if rank == len(weight):
        return torch.eye(rank, dtype=weight.dtype), weight
    _, vectors = torch.linalg.eigh(output_moment(weight, metric))
    up = vectors[:, -rank:].flip(-1)  # eigenvalues ascend
    return up, up.T @ weight


def relative_error(
    weight: torch.Tensor, product: torch.Tensor, metric: torch.Tensor | None = None
) -> float:
    """``‖(W - P) A^{1/2}‖_F / ‖W A^{1/2}‖_F``: of the weights, or with ``A`` of the outputs."""
    lost = output_moment(weight - product, metric).trace()
    return float((lost / output_moment(weight, metric).trace()).clamp(min=0).sqrt())
