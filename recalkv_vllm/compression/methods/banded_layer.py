"""The ways to store one layer in bands, and what each loses under its Fisher metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from recalkv_vllm.band_format import BLOCK_COLUMNS
from recalkv_vllm.compression.lowrank.layer_metric import BOTH, KEYS, VALUES, LayerMetric
from recalkv_vllm.compression.lowrank.regions import GroupLatent
from recalkv_vllm.compression.lowrank.two_sided import TwoSidedSvd
from recalkv_vllm.compression.methods.measured_layer import consecutive_groups
from recalkv_vllm.compression.ranks.bands import RegionBits, band_choices, unbeaten
from recalkv_vllm.compression.ranks.decode_time import LayerTimes
from recalkv_vllm.compression.ranks.widths import falling_steps

@dataclass(frozen=True, slots=True)
class BandedWay:
    """One way to store a layer.

    Args:
        key_region: columns that keys might read, of a nested latent before any were dropped; None
            if keys and values read all of it, or have latents of their own.
        regions: what is kept: of all columns, of the two regions, or of keys and of values.
        token_bytes: stored per token.
        loss: in the unit of squared singular values.
        time: predicted, as a fraction of the dense layer's.
    """

    key_region: int | None
    regions: tuple[RegionBits, ...]
    token_bytes: int
    loss: float
    time: float


@dataclass(frozen=True, slots=True)
class BandedLayer:
    """All ways to store a layer with its heads in one order, none beaten in all of bytes, loss and
    time."""

    head_order: tuple[int, ...]
    ways: list[BandedWay]


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
    ways: list[BandedWay] = []
    if spans == "split":
        v_size = len(head_order) // v_groups
        keys = [metric.svd(group, KEYS) for group in groups]
        values = [metric.svd(group, VALUES) for group in consecutive_groups(head_order, v_size)]
        spectra = [_spectra(keys), _spectra(values)]
        ways = layer_ways(None, spectra, (True, True), 0.0, times)
    else:
        latents = [group_latent(metric, group) for group in groups]
        for key_region in _key_regions(metric, k_group_size, spans):
            parts = [latent.regions(key_region) for latent in latents]
            spectra = [
                _spectra([part.regions[i] for part in parts]) for i in range(len(parts[0].regions))
            ]
            dropped = sum(part.dropped for part in parts)
            ways += layer_ways(key_region, spectra, (True, False), dropped, times)
    return BandedLayer(head_order, unbeaten(ways, lambda way: way.time))


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
    return [None, *(BLOCK_COLUMNS * width for width in falling_steps(most) if width <= most)]


def _whole_blocks(rows: int, inputs: int) -> int:
    return min(rows, inputs) // BLOCK_COLUMNS * BLOCK_COLUMNS


def _spectra(svds: Sequence[TwoSidedSvd]) -> np.ndarray:
    """Singular values ``[groups, columns]`` of one region."""
    width = _whole_blocks(len(svds[0].squares), svds[0].down.shape[1])
    return torch.stack([svd.squares[:width].sqrt() for svd in svds]).numpy()


def layer_ways(
    key_region: int | None,
    spectra: list[np.ndarray],
    required: Sequence[bool],
    dropped: float,
    times: LayerTimes,
) -> list[BandedWay]:
    """Ways to store a layer whose regions have these spectra, from fewest bytes to most.

    Args:
        key_region: see :class:`BandedWay`.
        spectra: of each region, singular values ``[groups, columns]``.
        required: of each region, whether it must keep a block.
        dropped: loss of taking the other regions from the keys.
        times: predicted, of the layer's spans.
    """
    ways = []
    for choice in band_choices(spectra, required[: len(spectra)]):
        k_width, *others = (region.width for region in choice.regions)
        v_width = others[0] if times.split else k_width + sum(others)
        bits = max(bits for region in choice.regions for bits in region.bits)
        time = times(k_width, v_width, choice.token_bytes, bits)
        ways.append(
            BandedWay(key_region, choice.regions, choice.token_bytes, choice.loss + dropped, time)
        )
    return ways
