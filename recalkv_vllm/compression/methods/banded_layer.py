"""The ways to store one layer in bands, and what each loses under its Fisher metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from recalkv_vllm.band_format import BLOCK_COLUMNS
from recalkv_vllm.compression.lowrank.layer_metric import BOTH, KEYS, VALUES, LayerMetric
from recalkv_vllm.compression.lowrank.regions import GroupLatent
from recalkv_vllm.compression.methods.measured_layer import consecutive_groups
from recalkv_vllm.compression.ranks.bands import (
    BandChoice,
    RegionBits,
    band_choices,
    stored_as,
    unbeaten,
)
from recalkv_vllm.compression.ranks.decode_time import LayerTimes
from recalkv_vllm.compression.ranks.widths import falling_steps


class BandShape(NamedTuple):
    """What a layer is cut into.

    Args:
        key_region: columns that keys might read, of a nested latent before any were dropped; None
            if keys and values read all of it, or have latents of their own.
        regions: what is kept: of all columns, of the two regions, or of keys and of values.
    """

    key_region: int | None
    regions: tuple[RegionBits, ...]


@dataclass(frozen=True, slots=True)
class BandedWay:
    """One way to store a layer.

    Args:
        shape: what it is cut into.
        token_bytes: stored per token.
        loss: in the unit of squared singular values.
        time: predicted, as a fraction of the dense layer's.
    """

    shape: BandShape
    token_bytes: int
    loss: float
    time: float


@dataclass(frozen=True, slots=True)
class BandedLayer:
    """All ways to store a layer with its heads in one order.

    Args:
        head_order: of the KV heads.
        ways: those that no other beats in all of bytes, loss and time.
        parts: of each region that keys might read, spectra of all regions, and the loss of taking
            the others from the keys.
        times: predicted, of the layer's spans.
    """

    head_order: tuple[int, ...]
    ways: list[BandedWay]
    parts: dict[int | None, tuple[list[np.ndarray], float]] = field(compare=False)
    times: LayerTimes = field(compare=False)

    def stored_as(self, shape: BandShape) -> BandedWay:
        """The layer in a shape, which may be another layer's."""
        spectra, dropped = self.parts[shape.key_region]
        return _way(shape.key_region, stored_as(spectra, shape.regions), dropped, self.times)


def measure_bands(
    metric: LayerMetric,
    head_order: tuple[int, ...],
    k_group_size: int,
    v_groups: int,
    spans: str,
    times: LayerTimes,
) -> BandedLayer:
    """Ways to store a layer.

    Args:
        metric: of the layer.
        head_order: groups are of neighbors in it.
        k_group_size: KV heads per K group.
        v_groups: V groups, of ``split`` spans.
        spans: one of :data:`recalkv_vllm.names.SPAN_KINDS`.
        times: predicted, of the layer's spans.
    """
    groups = consecutive_groups(head_order, k_group_size)
    inputs = metric.weight.shape[1]
    parts: dict[int | None, tuple[list[np.ndarray], float]] = {}
    if spans == "split":
        v_size = len(head_order) // v_groups
        keys = [metric.svd(group, KEYS).squares for group in groups]
        values = [
            metric.svd(group, VALUES).squares for group in consecutive_groups(head_order, v_size)
        ]
        parts[None] = [_spectra(keys, inputs), _spectra(values, inputs)], 0.0
        return banded_layer(head_order, parts, (True, True), times)
    latents = [group_latent(metric, group) for group in groups]
    for key_region in _key_regions(metric, k_group_size, spans):
        regions, dropped = zip(*(latent.squares(key_region) for latent in latents), strict=True)
        spectra = [_spectra(region, inputs) for region in zip(*regions, strict=True)]
        parts[key_region] = spectra, sum(dropped)
    return banded_layer(head_order, parts, (True, False), times)


def banded_layer(
    head_order: tuple[int, ...],
    parts: dict[int | None, tuple[list[np.ndarray], float]],
    required: Sequence[bool],
    times: LayerTimes,
) -> BandedLayer:
    """All ways to store a layer of known spectra.

    Args:
        head_order: see :class:`BandedLayer`, as ``parts`` and ``times``.
        parts: of each region that keys might read.
        required: of each region, whether it must keep a block.
        times: predicted.
    """
    ways = [
        _way(key_region, choice, dropped, times)
        for key_region, (spectra, dropped) in parts.items()
        for choice in band_choices(spectra, required[: len(spectra)])
    ]
    return BandedLayer(head_order, unbeaten(ways, lambda way: way.time), parts, times)


def group_latent(metric: LayerMetric, group: Sequence[int]) -> GroupLatent:
    """The latent that keys and values of a group share, in whole blocks of columns."""
    svd = metric.svd(group, BOTH)
    width = _whole_blocks(len(svd.squares), svd.down.shape[1])
    return GroupLatent(svd, metric.group_metric(group, BOTH), width)


def _key_regions(metric: LayerMetric, k_group_size: int, spans: str) -> list[int | None]:
    """None for a joint latent, and for nested ones some widths that keys might read."""
    if spans == "joint":
        return [None]
    rows = k_group_size * metric.head_dim
    blocks = _whole_blocks(2 * rows, metric.weight.shape[1]) // BLOCK_COLUMNS
    needed = -(-rows // BLOCK_COLUMNS)  # keys of n elements need no more than n columns
    most = min(needed, blocks - 1)
    return [None, *(BLOCK_COLUMNS * width for width in falling_steps(most))]


def _whole_blocks(rows: int, inputs: int) -> int:
    return min(rows, inputs) // BLOCK_COLUMNS * BLOCK_COLUMNS


def _spectra(squares: Sequence[torch.Tensor], inputs: int) -> np.ndarray:
    """Singular values ``[groups, columns]`` of one region, from their squares."""
    width = _whole_blocks(len(squares[0]), inputs)
    return torch.stack([each[:width].sqrt() for each in squares]).numpy()


def _way(
    key_region: int | None, choice: BandChoice, dropped: float, times: LayerTimes
) -> BandedWay:
    k_width, *others = (region.width for region in choice.regions)
    v_width = others[0] if times.split else k_width + sum(others)
    bits = max(bits for region in choice.regions for bits in region.bits)
    time = times(k_width, v_width, choice.token_bytes, bits)
    shape = BandShape(key_region, choice.regions)
    return BandedWay(shape, choice.token_bytes, choice.loss + dropped, time)
