"""What each choice of widths costs one layer, under its Kronecker-factored metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recalkv_vllm.compression.lowrank.layer_metric import BOTH, KEYS, VALUES, LayerMetric
from recalkv_vllm.compression.lowrank.nested import nested_losses
from recalkv_vllm.compression.ranks.widths import Widths


@dataclass(frozen=True, slots=True)
class MeasuredLayer:
    """Expected losses of one layer with its heads in one order.

    Args:
        head_order: of the KV heads; groups are of neighbors in it.
        widths: to choose from.
        losses: by truncation, of all widths.
        noises: per relative error of stored latents, of all widths.
    """

    head_order: tuple[int, ...]
    widths: list[Widths]
    losses: np.ndarray
    noises: np.ndarray

    def totals(self, latent_error: float) -> np.ndarray:
        """Losses of latents stored with this relative error, of all widths."""
        return self.losses + latent_error * self.noises


def measure_split(
    metric: LayerMetric,
    head_order: tuple[int, ...],
    k_group_size: int,
    v_groups: int,
    widths: list[Widths],
) -> MeasuredLayer:
    """Losses of latents of their own for every K group and every V group."""
    losses, noises = np.zeros(len(widths)), np.zeros(len(widths))
    v_group_size = len(head_order) // v_groups
    for group_size, which, ranks in (
        (k_group_size, KEYS, np.array([w.k_width for w in widths])),
        (v_group_size, VALUES, np.array([w.v_width for w in widths])),
    ):
        for group in consecutive_groups(head_order, group_size):
            svd = metric.svd(group, which)
            losses += svd.losses(ranks)
            noises += svd.noise(ranks)
    return MeasuredLayer(head_order, widths, losses, noises)


def measure_nested(
    metric: LayerMetric, head_order: tuple[int, ...], group_size: int, widths: list[Widths]
) -> MeasuredLayer:
    """Losses of one latent for K and V of every group, nested or joint."""
    losses, noises = np.zeros(len(widths)), np.zeros(len(widths))
    k_widths = np.array([w.k_width for w in widths])
    v_widths = np.array([w.v_width for w in widths])
    for group in consecutive_groups(head_order, group_size):
        svd, outputs = metric.svd(group, BOTH), metric.group_metric(group, BOTH)
        losses += nested_losses(svd, outputs, k_widths, v_widths)
        noises += svd.noise(v_widths)
    return MeasuredLayer(head_order, widths, losses, noises)


def consecutive_groups(head_order: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Groups of ``size`` heads that are next to each other."""
    return [tuple(head_order[i : i + size]) for i in range(0, len(head_order), size)]
