"""A group's latent in regions, each with columns in the order of what losing them costs.

Within a region every group of heads that reads one column reads all, so that columns may be mixed
at will. Bits are spent where they count if they are not: a region keeps its singular directions
apart, largest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

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


class GroupLatent:
    """The full latent of a head group, to be cut into regions.

    Args:
        svd: of the group's stacked ``[W_k; W_v]``, each ``[n, H]``.
        output_metric: ``G: [2n, 2n]``.
        width: columns of the latent, at most ``2n`` and ``H``.
    """

    def __init__(self, svd: TwoSidedSvd, output_metric: torch.Tensor, width: int):
        self._svd, self._output_metric, self._width = svd, output_metric, width

    def regions(self, k_width: int | None) -> NestedRegions:
        """The latent turned until ``k_width`` columns hold what keys need most.

        Keys read the first region only; values make up for their part of what that loses. Both
        losses add up: latents of the two regions are uncorrelated under the input metric.

        Args:
            k_width: columns of the first region, fewer than all; None: keys and values read all
                columns, which stay as they are.
        """
        if k_width is None:
            return NestedRegions((self._svd,), 0.0)
        _, down = self._svd.truncated(self._width)
        scale = latent_scale(self._svd, self._width)
        down = self._keys_first[1].T @ (down / scale[:, None])
        keys, own, dropped = self._cut(k_width)
        return NestedRegions(
            (
                _diagonalized(keys, down[:k_width], self._half),
                _diagonalized(own, down[k_width:], self._half),
            ),
            dropped,
        )

    def squares(self, k_width: int | None) -> tuple[list[torch.Tensor], float]:
        """Only the squared singular values of :meth:`regions`, and what it drops."""
        if k_width is None:
            return [self._svd.squares], 0.0
        *ups, dropped = self._cut(k_width)
        moments = (_moment(up, self._half) for up in ups)
        return [torch.linalg.eigvalsh(m).flip(0).clamp(min=0) for m in moments], dropped

    def _cut(self, k_width: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Up factors of both regions, and the loss of taking the second from the keys."""
        up, _, energy = self._keys_first
        own = without_keys(up[:, k_width:], self._output_metric)
        return up[:, :k_width], own, float(energy[k_width:].clamp(min=0).sum())

    @cached_property
    def _keys_first(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """An up factor whose columns keys need most come first, the rotation to it, and the loss of
        taking each column from the keys; the same wherever the first region ends."""
        up, _ = self._svd.truncated(self._width)
        whitened = up * latent_scale(self._svd, self._width)
        energy, rotation = key_rotation(whitened, self._output_metric)
        return whitened @ rotation, rotation, energy

    @cached_property
    def _half(self) -> torch.Tensor:
        half, _ = roots(self._output_metric)
        return half


def _diagonalized(up: torch.Tensor, down: torch.Tensor, half: torch.Tensor) -> TwoSidedSvd:
    """A region of latents of unit covariance with its singular directions apart."""
    squares, rotation = torch.linalg.eigh(_moment(up, half))
    squares, rotation = squares.flip(0).clamp(min=0), rotation.flip(1)
    balance = squares.clamp(min=1e-14 * float(squares[0])).pow(0.25)
    return TwoSidedSvd(squares, up @ rotation / balance, rotation.T @ down * balance[:, None])


def _moment(up: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    return (half @ up).T @ (half @ up)


def stack_regions(
    regions: Sequence[TwoSidedSvd], widths: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """``L`` and ``R`` of the first ``widths`` columns of each region."""
    factors = [svd.truncated(width) for svd, width in zip(regions, widths, strict=True)]
    return torch.cat([up for up, _ in factors], dim=1), torch.cat([down for _, down in factors])
