"""Bits of every block of columns of a layer, for each number of bytes, by the loss they leave.

A block of 32 columns with singular values ``s`` costs, in the unit of their squares, ``Σ s²`` if it
is dropped, and ``ε_b · (Σ s)² / 32`` in ``b`` bits, ``ε_b`` being the quantizer's error relative to
what it stores: with ``√S`` on both sides a latent has covariance ``S`` and its up factor the metric
``S``; a rotation inside the block gives all its columns the variance and the weight ``Σ s / 32``.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from recalkv_vllm.band_format import BLOCK_COLUMNS, PLANES, Band, BandFormat, bands_of
from recalkv_vllm.compression.latents.rounding_error import rounding_error

#: Bits that a block may get; none drops it.
WIDTHS = (0, *PLANES)


class Stored(Protocol):
    """A way to store a layer, as far as it has a price."""

    @property
    def token_bytes(self) -> int: ...

    @property
    def loss(self) -> float: ...


Way = TypeVar("Way", bound=Stored)


@dataclass(frozen=True, slots=True)
class RegionBits:
    """Blocks of one region that are kept.

    Args:
        groups: of the region; all have these blocks.
        bits: of each block, largest singular values first.
    """

    groups: int
    bits: tuple[int, ...]

    @property
    def width(self) -> int:
        """Columns of one group."""
        return BLOCK_COLUMNS * len(self.bits)

    @property
    def bands(self) -> tuple[Band, ...]:
        """Of one group."""
        return bands_of(self.bits)


@dataclass(frozen=True, slots=True)
class BandChoice:
    """One way to store a layer.

    Args:
        regions: what is kept of each.
        token_bytes: stored per token, padding and scales included.
        loss: in the unit of squared singular values.
    """

    regions: tuple[RegionBits, ...]
    token_bytes: int
    loss: float


@functools.cache
def quantizer_error(bits: int) -> float:
    """Mean squared error of a block in ``bits`` bits, relative to what it stores; 1 in none."""
    return 1.0 if bits == 0 else rounding_error(BandFormat((Band(BLOCK_COLUMNS, bits),)))


def band_choices(spectra: Sequence[np.ndarray], required: Sequence[bool]) -> list[BandChoice]:
    """The ways to store a layer that lose least for what they take, from fewest bytes to most.

    Exact, by dynamic programming over bytes, but for the padding of codes.

    Args:
        spectra: of each region, singular values ``[groups, columns]``, descending, in whole blocks.
        required: of each region, whether it must keep a block.
    """
    unit = math.gcd(*(len(values) for values in spectra))
    costs, losses, regions = _blocks(spectra, required, unit)
    states = int(costs.max(axis=1).sum()) + 1
    best = np.full(states, np.inf)
    best[0] = 0
    picked = np.zeros((len(costs), states), dtype=np.int8)
    for row, cost, loss in zip(picked, costs, losses, strict=True):
        after = np.full(states, np.inf)
        for i, (c, lost) in enumerate(zip(cost, loss, strict=True)):
            total = best[: states - c] + lost
            better = total < after[c:]
            after[c:][better] = total[better]
            row[c:][better] = i
        best = after
    choices: list[BandChoice] = []
    least = np.inf
    for state in np.flatnonzero(np.isfinite(best)):
        if best[state] >= least:
            continue  # more bytes, and no better
        least = best[state]
        bits = _backtrack(picked, costs, int(state))
        choices.append(_choice(spectra, regions, bits, float(least)))
    return unbeaten(choices)


def _blocks(
    spectra: Sequence[np.ndarray], required: Sequence[bool], unit: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Costs in ``unit`` bytes and losses ``[blocks, widths]``, and each block's region."""
    errors = np.array([quantizer_error(bits) for bits in WIDTHS[1:]])
    costs, losses, regions = [], [], []
    for region, values in enumerate(spectra):
        blocks = values.reshape(len(values), -1, BLOCK_COLUMNS)
        dropped = np.square(blocks).sum(axis=(0, 2))
        if required[region]:
            dropped[0] = np.inf
        noise = np.square(blocks.sum(axis=2)).sum(axis=0) / BLOCK_COLUMNS
        losses.append(np.concatenate((dropped[:, None], noise[:, None] * errors), axis=1))
        cost = [0, *(len(values) // unit * (BLOCK_COLUMNS * b // 8 + 1) for b in WIDTHS[1:])]
        costs += [cost] * len(dropped)
        regions += [region] * len(dropped)
    return np.array(costs), np.concatenate(losses), np.array(regions)


def _backtrack(picked: np.ndarray, costs: np.ndarray, state: int) -> list[int]:
    """Bits of every block."""
    bits = []
    for row, cost in zip(picked[::-1], costs[::-1], strict=True):
        choice = int(row[state])
        bits.append(WIDTHS[choice])
        state -= int(cost[choice])
    return bits[::-1]


def _choice(
    spectra: Sequence[np.ndarray], regions: np.ndarray, bits: list[int], loss: float
) -> BandChoice:
    kept = []
    for region, values in enumerate(spectra):
        # Ties may come in any order; larger values never get fewer bits for it.
        own = sorted((b for b, r in zip(bits, regions, strict=True) if r == region), reverse=True)
        kept.append(RegionBits(len(values), tuple(b for b in own if b)))
    stored = BandFormat(tuple(band for region in kept for band in region.bands * region.groups))
    return BandChoice(tuple(kept), stored.slot_bytes(stored.rank), loss)


def stored_as(spectra: Sequence[np.ndarray], regions: Sequence[RegionBits]) -> BandChoice:
    """A layer stored in given bits, of the first blocks of each region.

    Args:
        spectra: as those of :func:`band_choices`.
        regions: bits of each region; the last may be left out altogether.
    """
    loss = 0.0
    for i, values in enumerate(spectra):
        bits = regions[i].bits if i < len(regions) else ()
        blocks = values.reshape(len(values), -1, BLOCK_COLUMNS)
        if len(bits) > blocks.shape[1]:
            raise ValueError(f"bits: expected {blocks.shape[1]} blocks at most, found {len(bits)}")
        noise = np.square(blocks.sum(axis=2)).sum(axis=0) / BLOCK_COLUMNS
        loss += sum(noise[b] * quantizer_error(width) for b, width in enumerate(bits))
        loss += float(np.square(blocks[:, len(bits) :]).sum())
    stored = BandFormat(tuple(band for region in regions for band in region.bands * region.groups))
    return BandChoice(tuple(regions), stored.slot_bytes(stored.rank), float(loss))


def unbeaten(ways: Iterable[Way], time: Callable[[Way], float] = lambda way: 0.0) -> list[Way]:
    """Those that no other beats in bytes, loss and time, from fewest bytes to most."""
    best: list[Way] = []
    times: list[float] = []  # of the fastest so far, with what they lose: ever slower and better
    losses: list[float] = []
    for way in sorted(ways, key=lambda each: (each.token_bytes, each.loss, time(each))):
        at = bisect.bisect_right(times, time(way))
        if at and losses[at - 1] <= way.loss:
            continue
        best.append(way)
        at = bisect.bisect_left(times, time(way))
        end = at
        while end < len(losses) and losses[end] >= way.loss:
            end += 1
        times[at:end], losses[at:end] = [time(way)], [way.loss]
    return best
