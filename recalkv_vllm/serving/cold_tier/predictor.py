"""What a code is likely to be: predicted from those before it, in arithmetic that is exact.

A layer's columns are correlated with one another, since rotations mix them, and with those of the
layer below, which sees nearly the same hidden state. A predictor has linear weights, fitted once to
cached latents (``fit.py``). Of a code its distance from the prediction is stored, modulo the number
of codes: distances are mostly small, so their entropy is.

Who reads has to predict what the writer did to the last bit, on whatever machine. So elements are
rounded to integers within ±127, and weights to integers whose magnitudes add up to less than 2**17:
every partial sum is an integer below 2**24, which float32 holds exactly, in any order of summation.
All else is done element by element, where IEEE 754 leaves no choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from recalkv_vllm.band_format import BLOCK_COLUMNS, BandFormat, decode_scales
from recalkv_vllm.serving.cold_tier.chunk_layout import Bytes, Latents
from recalkv_vllm.serving.cold_tier.decode_block import LARGEST, decode_block

Floats = npt.NDArray[np.float32]

#: The element before all of a layer's, with which predictions have a mean.
CONSTANT = 64
#: More than the magnitudes of a column's weights add up to.
WEIGHT_SUM = 1 << 17
#: The largest weight, which 16 bits hold.
LARGEST_WEIGHT = (1 << 15) - 1

_DECODED = decode_scales(torch.arange(256, dtype=torch.uint8)).numpy()
#: Scales by their byte, and their inverses; zero where there is none.
SCALES: Floats = np.where(np.isfinite(_DECODED), _DECODED, 0).astype(np.float32)
INVERSES: Floats = np.divide(1, SCALES, out=np.zeros_like(SCALES), where=SCALES > 0)


@dataclass(frozen=True)
class LayerPredictor:
    """Weights of one layer.

    Args:
        below: ``[rank, 1 + seen]``, of what :func:`seen_from_above` gives.
        inside: ``[rank, rank]``, of the layer's own columns; strictly lower triangular.
        to_integer: ``[rank, 1]``: an element times this is its integer before rounding.
        from_sum: ``[rank, 1]``: a weighted sum times this is an element.
        classes: ``[rank]``: distances of columns of one class are about as far.
        scales: ``[blocks, 1]``: the usual byte of each scale.
    """

    below: Floats
    inside: Floats
    to_integer: Floats
    from_sum: Floats
    classes: Bytes
    scales: Bytes

    def encode(self, latents: Latents, below: Floats, half: Floats) -> tuple[Bytes, Floats]:
        """Distances ``[rank, tokens]`` of a layer's codes, and what the layer above gets.

        Args:
            latents: of the layer.
            below: ``[1 + seen, tokens]``, see :func:`seen_from_above`.
            half: ``[rank, 1]``, see :func:`half_ranges`.
        """
        integers = to_integers(latents, half, self.to_integer)
        centers = self.below @ below + self.inside @ integers
        centers *= _of_columns(INVERSES[latents.scales]) * self.from_sum
        centers = np.clip(np.floor(centers + half), 0, 2 * half - 1).astype(np.uint8)
        return latents.codes - centers & (2 * half - 1).astype(np.uint8), integers

    def decode(
        self, distances: Bytes, scales: Bytes, below: Floats, half: Floats
    ) -> tuple[Bytes, Floats]:
        """Inverse of :meth:`encode`: codes ``[rank, tokens]``, and what the layer above gets."""
        sums = self.below @ below
        codes, integers = np.empty_like(distances), np.empty_like(sums)
        for block, start in enumerate(range(0, len(codes), BLOCK_COLUMNS)):
            rows, end = slice(start, start + BLOCK_COLUMNS), start + BLOCK_COLUMNS
            decode_block(
                *(distances[rows], sums[rows], self.inside[rows, rows]),
                *(INVERSES[scales[block]], self.from_sum[rows, 0]),
                *(SCALES[scales[block]], self.to_integer[rows, 0], half[start, 0]),
                *(codes[rows], integers[rows]),
            )
            sums[end:] += self.inside[end:, rows] @ integers[rows]
        return codes, integers


def to_integers(latents: Latents, half: Floats, factor: Floats) -> Floats:
    """Elements ``[rank, tokens]``, times ``factor: [rank, 1]``, as integers that predictions are
    made of; zeros where a scale is not a number."""
    scaled = (latents.codes + (np.float32(0.5) - half)) * (
        _of_columns(SCALES[latents.scales]) * factor
    )
    return np.clip(np.rint(scaled), -LARGEST, LARGEST)


def _of_columns(blocks: Floats) -> Floats:
    """``[rank, tokens]`` of what a block's columns share."""
    return np.repeat(blocks, BLOCK_COLUMNS, axis=0)


def seen_from_above(integers: Floats | None, latents: BandFormat | None, tokens: int) -> Floats:
    """What a layer's predictions are made of besides its own columns: ``[1 + seen, tokens]``.

    That is a constant, and of the layer below the half of the columns with the most bits, which
    have most of the energy. The other half would take longer than it is worth.

    Args:
        integers: of the layer below; None for the lowest layer.
        latents: how the layer below stores them.
        tokens: of the batch.
    """
    constant = np.full((1, tokens), CONSTANT, np.float32)
    if integers is None or latents is None:
        return constant
    by_bits = np.argsort(-half_ranges(latents)[:, 0], kind="stable")
    return np.concatenate([constant, integers[np.sort(by_bits[: latents.rank // 2])]])


def half_ranges(latents: BandFormat) -> Floats:
    """``2**(b - 1)`` of every column's bits ``b``: ``[rank, 1]``."""
    return np.concatenate(
        [np.full((band.columns, 1), 1 << (band.bits - 1), np.float32) for band in latents.bands]
    )
