"""Bits of blocks: what each number of bytes buys, and nothing that fits loses less."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recalkv_vllm.band_format import BLOCK_COLUMNS, Band, BandFormat
from recalkv_vllm.compression.latents.rotation import random_rotation
from recalkv_vllm.compression.ranks.bands import WIDTHS, band_choices, quantizer_error


def spectrum(groups: int, blocks: int, seed: int, decay: float = 3.0) -> np.ndarray:
    """Singular values ``[groups, columns]``, descending over some decades."""
    rng = np.random.default_rng(seed)
    columns = blocks * BLOCK_COLUMNS
    values = 10 ** (-decay * np.arange(columns) / columns) * rng.uniform(0.5, 1, (groups, columns))
    return -np.sort(-values, axis=1)


def expected_loss(spectra: list[np.ndarray], bits: list[tuple[int, ...]]) -> float:
    total = 0.0
    for values, widths in zip(spectra, bits, strict=True):
        for group in values:
            for block, width in zip(group.reshape(-1, BLOCK_COLUMNS), widths, strict=True):
                if width:
                    total += quantizer_error(width) * block.sum() ** 2 / BLOCK_COLUMNS
                else:
                    total += np.square(block).sum()
    return total


def stored_bytes(spectra: list[np.ndarray], bits: list[tuple[int, ...]]) -> int:
    bands = tuple(
        Band(BLOCK_COLUMNS, width)
        for values, widths in zip(spectra, bits, strict=True)
        for _ in values
        for width in widths
        if width
    )
    return BandFormat(bands).slot_bytes(len(bands) * BLOCK_COLUMNS)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 99),
    shapes=st.sampled_from([[(1, 3)], [(3, 3)], [(2, 2), (2, 1)], [(2, 1), (1, 3)]]),
    decay=st.sampled_from([0.5, 2.0, 5.0]),
)
def test_nothing_as_small_loses_less_but_for_padding(seed, shapes, decay):
    """Against all combinations of bits; padding to 16 bytes is the one thing not searched over."""
    spectra = [spectrum(groups, blocks, seed, decay) for groups, blocks in shapes]
    required = (True, False)[: len(spectra)]
    choices = band_choices(spectra, required)
    per_region = [list(itertools.product(WIDTHS, repeat=blocks)) for _, blocks in shapes]
    everything = [
        (stored_bytes(spectra, list(bits)), expected_loss(spectra, list(bits)))
        for bits in itertools.product(*per_region)
        if any(bits[0])
    ]
    for choice in choices:
        bits = [
            region.bits + (0,) * (values.shape[1] // BLOCK_COLUMNS - len(region.bits))
            for region, values in zip(choice.regions, spectra, strict=True)
        ]
        assert choice.token_bytes == stored_bytes(spectra, bits)
        assert choice.loss == pytest.approx(expected_loss(spectra, bits))
        smaller = [loss for size, loss in everything if size < choice.token_bytes - 15]
        assert choice.loss <= min(smaller, default=np.inf) * (1 + 1e-9)
    sizes, losses = zip(*((c.token_bytes, c.loss) for c in choices), strict=True)
    assert list(sizes) == sorted(set(sizes))
    assert list(losses) == sorted(set(losses), reverse=True)


def test_larger_values_never_get_fewer_bits():
    for choice in band_choices([spectrum(2, 8, 0), spectrum(3, 4, 1)], (True, True)):
        for region in choice.regions:
            assert list(region.bits) == sorted(region.bits, reverse=True)
            assert region.bits
            assert sum(band.columns for band in region.bands) == region.width


def test_a_flat_spectrum_is_cut_and_a_steep_one_is_graded():
    flat = band_choices([spectrum(1, 8, 0, decay=0.0)], (True,))
    steep = band_choices([spectrum(1, 8, 0, decay=6.0)], (True,))
    flat_bits, steep_bits = (
        max((c for c in choices if c.token_bytes <= 88), key=lambda c: c.token_bytes)
        .regions[0]
        .bits
        for choices in (flat, steep)
    )
    assert len(flat_bits) == 8
    assert len(set(flat_bits)) <= 2
    assert len(steep_bits) <= 5
    assert len(set(steep_bits)) >= 4


@pytest.mark.parametrize("bits", WIDTHS[1:])
def test_expected_error_fits_the_quantizer(bits):
    """On latents as they come: uneven columns, rotated inside their block."""
    torch.manual_seed(bits)
    scale = torch.logspace(0, -1, BLOCK_COLUMNS)
    z = torch.randn(20_000, BLOCK_COLUMNS) * scale @ random_rotation(BLOCK_COLUMNS).float()
    error = BandFormat(((BLOCK_COLUMNS, bits),)).round_trip(z) - z
    found = float(error.square().mean() / z.square().mean())
    assert found == pytest.approx(quantizer_error(bits), rel=0.25)
