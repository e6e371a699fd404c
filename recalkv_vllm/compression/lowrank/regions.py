"""A group's latent in regions, each with columns in the order of what losing them costs.

Within a region every group of heads that reads one column reads all, so that columns may be mixed
at will. Bits are spent where they count if they are not: a region keeps its singular directions
apart, largest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recalkv_vllm.compression.lowrank.nested import key_rotation, latent_scale, without_keys
from recalkv_vllm.compression.lowrank.two_sided import TwoSidedSvd, roots


@dataclass(frozen=True, slots=True)
class NestedRegions:
    """One latent for keys and values of a group: columns that both read, then the values' own.

    Args:
        regions: the two, each as an SVD of its part of the product.
        dropped: expected loss (twice, as all squares) of taking the second region from the keys.
    """

    regions: tuple[TwoSidedSvd, ...]
    dropped: float


def joint_region(svd: TwoSidedSvd) -> NestedRegions:
    """Keys and values read all columns."""
    return NestedRegions((svd,), 0.0)


def nested_regions(
    svd: TwoSidedSvd, output_metric: torch.Tensor, k_width: int, width: int
) -> NestedRegions:
    """Turn a group's full latent until ``k_width`` columns hold what keys need most.

    Keys read the first region only; values make up for their part of what that loses. Both losses
    add up: latents of the two regions are uncorrelated under the input metric.

    Args:
        svd: of a group's stacked ``[W_k; W_v]``, each ``[n, H]``.
        output_metric: ``G: [2n, 2n]``.
        k_width: columns of the first region, fewer than ``width``.
        width: columns of the latent, at most ``2n`` and ``H``.
    """
    up, down = svd.truncated(width)
    scale = latent_scale(svd, width)
    whitened = up * scale
    energy, rotation = key_rotation(whitened, output_metric)
    up, down = whitened @ rotation, rotation.T @ (down / scale[:, None])
    dropped = float(energy[k_width:].clamp(min=0).sum())
    up[:, k_width:] = without_keys(up[:, k_width:], output_metric)
    half, _ = roots(output_metric)
    regions = tuple(
        _diagonalized(up[:, part], down[part], half)
        for part in (slice(0, k_width), slice(k_width, width))
    )
    return NestedRegions(regions, dropped)


def _diagonalized(up: torch.Tensor, down: torch.Tensor, half: torch.Tensor) -> TwoSidedSvd:
    """A region of latents of unit covariance with its singular directions apart."""
    squares, rotation = torch.linalg.eigh((half @ up).T @ (half @ up))
    squares, rotation = squares.flip(0).clamp(min=0), rotation.flip(1)
    balance = squares.clamp(min=1e-14 * float(squares[0])).pow(0.25)
    return TwoSidedSvd(squares, up @ rotation / balance, rotation.T @ down * balance[:, None])


def stack_regions(
    regions: Sequence[TwoSidedSvd], widths: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """``L`` and ``R`` of the first ``widths`` columns of each region."""
    factors = [svd.truncated(width) for svd, width in zip(regions, widths, strict=True)]
    return torch.cat([up for up, _ in factors], dim=1), torch.cat([down for _, down in factors])
