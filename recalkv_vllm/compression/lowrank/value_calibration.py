"""Offline value calibration (ReCalKV, section 3.3)."""

from __future__ import annotations

import torch

from recalkv_vllm.compression.lowrank.linalg import output_moment, truncated_factors

#: Stop when an iteration lowers the squared output error by less than this part of it.
TOLERANCE = 1e-5
MAX_ITERATIONS = 1000


def calibrate_values(
    weight: torch.Tensor,
    second_moment: torch.Tensor,
    factors: tuple[torch.Tensor, torch.Tensor],
    *,
    max_iterations: int = MAX_ITERATIONS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Refit factors to the layer's outputs by alternating least squares.

    Minimizes ``E‖(W - L R) x‖² = ‖(W - L R) A^{1/2}‖_F²`` over ``L`` with ``R`` fixed, then over
    ``R`` with ``L`` fixed, both in closed form. The error never rises, and the limit is the
    whitened SVD of the same rank, the optimum.

    Args:
        weight: ``W: [n, H]`` float64.
        second_moment: ``A: [H, H]``, positive definite.
        factors: ``L: [n, r]`` and ``R: [r, H]`` to start from.

    Returns:
        ``L`` with orthonormal columns, and ``R``.
    """
    up, down = factors
    if up.shape[1] == len(weight):
        return factors
    moment = output_moment(weight, second_moment)
    total = moment.trace()
    error = torch.inf
    # L = W A Rᵀ (R A Rᵀ)⁻¹. Only its column space matters for the next step, and there an
    # orthonormal basis gives the same product with well-conditioned factors.
    basis, _ = torch.linalg.qr(weight @ (second_moment @ down.T))
    for _ in range(max_iterations):
        previous, error = error, float(total - torch.sum(basis * (moment @ basis)))
        if previous - error <= TOLERANCE * abs(error):
            break
        # With R = (Lᵀ L)⁻¹ Lᵀ W = Lᵀ W, the next L = W A Rᵀ is (W A Wᵀ) L: only n × n products.
        basis, _ = torch.linalg.qr(moment @ basis)
    return basis, basis.T @ weight


def value_factors(
    weight: torch.Tensor, rank: int, second_moment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain SVD of ``W_v``, calibrated: ``L: [n, rank]``, ``R: [rank, H]``."""
    return calibrate_values(weight, second_moment, truncated_factors(weight, rank))
