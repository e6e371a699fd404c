"""One latent for keys and values of a head group, of which keys read the first columns.

Reconstructing keys is what decoding pays for; values are nearly free. A latent may be rotated at
will, so it is turned until the keys' energy leads, and keys read only as many columns as are paid
for.
"""

from __future__ import annotations

import numpy as np
import torch

from recalkv_vllm.compression.lowrank.two_sided import FLOOR, TwoSidedSvd

#: The loss of narrow key spans is computed at this many ranks and interpolated between.
SAMPLED_RANKS = 16


def nested_latent(
    svd: TwoSidedSvd, output_metric: torch.Tensor, k_width: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of a latent of ``width`` elements whose first ``k_width`` alone make the keys.

    Args:
        svd: of one group's stacked ``[W_k; W_v]``, each ``[n, H]``.
        output_metric: ``G: [2n, 2n]``.
        k_width: at most ``width``; all of it makes a joint latent.
        width: at most ``2n`` and ``H``.

    Returns:
        ``L: [2n, width]``, its K rows zero from column ``k_width`` on, and ``R: [width, H]``.
    """
    up, down = svd.truncated(width)
    if k_width == width:
        return up, down
    scale = latent_scale(svd, width)
    whitened = up * scale  # of a latent of unit variance under A
    _, rotation = key_rotation(whitened, output_metric)
    up, down = whitened @ rotation, rotation.T @ (down / scale[:, None])
    up[:, k_width:] = without_keys(up[:, k_width:], output_metric)
    # As √S on both sides: each column's cost split evenly between the factors.
    balance = torch.einsum("ir,ij,jr->r", up, output_metric, up).pow(0.25)
    balance = balance.clamp(min=FLOOR * float(balance.max()))
    return up / balance, down * balance[:, None]


def nested_losses(
    svd: TwoSidedSvd, output_metric: torch.Tensor, k_widths: np.ndarray, widths: np.ndarray
) -> np.ndarray:
    """Expected loss of :func:`nested_latent` for pairs of widths."""
    losses = svd.losses(widths)
    narrow = k_widths < np.minimum(widths, len(svd.up) // 2)
    if not narrow.any():
        return losses
    found = np.unique(widths[narrow])
    at = found[np.unique(np.linspace(0, len(found) - 1, SAMPLED_RANKS).round().astype(int))]
    energies = [_energies(svd, output_metric, int(width)) for width in at]
    for k_width in np.unique(k_widths[narrow]):
        own = narrow & (k_widths == k_width)
        dropped = [energy[max(0, len(energy) - 1 - k_width)] for energy in energies]
        losses[own] += np.interp(widths[own], at, dropped)
    return losses


def _energies(svd: TwoSidedSvd, output_metric: torch.Tensor, width: int) -> np.ndarray:
    """``[width + 1]``: what is lost if keys do not read that many directions of a latent."""
    whitened = svd.up[:, :width] * latent_scale(svd, width)
    energy = torch.linalg.eigvalsh(_key_energy(whitened, output_metric)).clamp(min=0)
    return np.concatenate(([0.0], energy.cumsum(0).numpy()))


def without_keys(up: torch.Tensor, output_metric: torch.Tensor) -> torch.Tensor:
    """Columns ``[2n, columns]`` that keys no longer read.

    Values make up for the part of the loss that is shared: argmin over their rows of the metric.
    """
    n = len(up) // 2
    own = torch.linalg.solve(output_metric[n:, n:], output_metric[n:, :n] @ up[:n])
    return torch.cat((torch.zeros_like(own), up[n:] + own))


def key_rotation(
    whitened: torch.Tensor, output_metric: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of taking each direction of a whitened latent from the keys, largest first, and the
    rotation ``[width, width]`` to these directions."""
    energy, rotation = torch.linalg.eigh(_key_energy(whitened, output_metric))
    return energy.flip(0), rotation.flip(1)


def latent_scale(svd: TwoSidedSvd, width: int) -> torch.Tensor:
    """Standard deviation of each element of the latent under the input metric: ``√S``."""
    squares = svd.squares[:width]
    return squares.clamp(min=FLOOR * float(squares[0])).pow(0.25)


def _key_energy(whitened: torch.Tensor, output_metric: torch.Tensor) -> torch.Tensor:
    """``L_kᵀ S L_k: [width, width]``: the loss of taking directions of the latent from the keys.

    ``S = G_kk - G_kv G_vv⁻¹ G_vk``, because values make up for their part of it.
    """
    n = len(whitened) // 2
    cross = output_metric[n:, :n]
    schur = output_metric[:n, :n] - cross.T @ torch.linalg.solve(output_metric[n:, n:], cross)
    energy = whitened[:n].T @ schur @ whitened[:n]
    return (energy + energy.T) / 2
