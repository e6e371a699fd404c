"""The format of latents in bands: sizes, packing, scales, error bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recalkv_vllm.band_format import (
    PLANES,
    Band,
    BandFormat,
    bands_of,
    decode_scales,
    encode_scales,
)
from recalkv_vllm.span import Span

NAN, INFINITY, LARGEST = 0xFF, 0xF8, 0xF7
FINITE = torch.arange(LARGEST + 1, dtype=torch.uint8)
MIXED = BandFormat(((32, 8), (64, 6), (32, 4), (96, 3), (32, 2)))


@given(st.lists(st.sampled_from(tuple(PLANES)), min_size=1, max_size=9), st.integers(-6, 14))
def test_error_is_at_most_half_a_step(bits: list[int], magnitude: int) -> None:
    form = BandFormat(bands_of(bits))
    generator = torch.Generator().manual_seed(len(bits))
    z = torch.randn(7, form.rank, generator=generator) * 2.0**magnitude
    z[0] = 0
    codes, scales = form.quantize(z)
    assert scales.shape == (7, len(bits))
    back = form.dequantize(codes, scales)
    assert (back[0] == 0).all()
    largest = z.unflatten(-1, (-1, 32)).abs().amax(-1)
    # Scales are rounded up by an eighth at most.
    steps = largest * 1.125 / torch.tensor([2.0 ** (b - 1) for b in bits])
    limit = steps.repeat_interleave(32, dim=-1) / 2 * (1 + 1e-6)
    assert ((back - z).abs() <= limit).all()
    assert torch.equal(form.unpack(form.pack(codes)), codes)
    assert form.pack(codes).shape == (7, form.code_bytes)


@pytest.mark.parametrize("bits", PLANES)
def test_no_element_is_cut_off(bits: int) -> None:
    """Rounding a scale up keeps the largest element within half a step of its code."""
    form = BandFormat(((32, bits),))
    z = torch.zeros(2001, 32)
    z[:, 7] = torch.linspace(0.5, 1.5, 2001) * torch.tensor([1.0, -1.0]).repeat(1001)[:2001]
    codes, scales = form.quantize(z)
    step = decode_scales(scales)
    error = (form.dequantize(codes, scales) - z)[:, 7:8].abs()
    assert (error <= step / 2 * (1 + 1e-6)).all()


def test_codes_of_known_numbers() -> None:
    form = BandFormat(((32, 4),))
    z = torch.tensor([8.0, -8.0, 0.4, -0.4, 7.3, -7.3, 1.0, -1.0] + [0.0] * 24)
    codes, scales = form.quantize(z)
    assert decode_scales(scales).tolist() == [1.0]
    assert codes[:8].tolist() == [15, 0, 8, 7, 15, 0, 9, 7]
    assert form.dequantize(codes, scales)[:4].tolist() == [7.5, -7.5, 0.5, -0.5]


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (2, [0xE4] * 8 + [0] * 8),
        (3, [0xE4] * 8 + [0xF0] * 4 + [0] * 4),
        (4, [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2),
        (6, [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2 + [0] * 4 + [0x55] * 4 + [0] * 8),
        (8, list(range(32))),
    ],
)
def test_bytes_of_known_codes(bits: int, expected: list[int]) -> None:
    form = BandFormat(((32, bits),))
    codes = (torch.arange(32) % 2**bits).to(torch.uint8)
    assert form.pack(codes).tolist() == expected
    assert torch.equal(form.unpack(form.pack(codes)), codes)


def test_bands_follow_each_other_without_gaps() -> None:
    form = BandFormat(((32, 3), (32, 8), (32, 2)))
    codes = torch.cat((torch.full((32,), 5), torch.arange(32), torch.full((32,), 2)))
    packed = form.pack(codes.to(torch.uint8)).tolist()
    assert packed == [0x55] * 8 + [0xFF] * 4 + list(range(32)) + [0xAA] * 8 + [0] * 12


def test_every_scale_encodes_to_its_byte() -> None:
    scales = decode_scales(FINITE)
    assert scales[0] == 0
    assert float(scales[1]) == 2.0**-17
    assert float(scales[-1]) == 61440
    assert (scales.diff() > 0).all()
    assert torch.equal(encode_scales(scales), FINITE)


def test_scales_are_rounded_up_to_the_next_one() -> None:
    scales = decode_scales(FINITE)
    above = torch.nextafter(scales, torch.tensor(torch.inf))
    assert torch.equal(encode_scales(above[:-1]), FINITE[1:])
    below = torch.nextafter(scales, torch.tensor(0.0))
    assert torch.equal(encode_scales(below), FINITE)


def test_scales_out_of_range() -> None:
    scales = torch.tensor([1e-45, 2.0**-30, 61441.0, 3e38, torch.inf, torch.nan])
    codes = encode_scales(scales)
    assert codes.tolist() == [1, 1, LARGEST, LARGEST, INFINITY, NAN]
    assert decode_scales(codes)[4].item() == torch.inf
    assert decode_scales(codes)[5].isnan()


def test_not_a_number_stays_one() -> None:
    z = torch.ones(2, MIXED.rank)
    z[0, 5::32] = torch.nan
    back = MIXED.round_trip(z)
    assert back[0].isnan().all()
    assert back[1].isfinite().all()


def test_tiny_and_huge_elements_stay_finite() -> None:
    z = torch.full((2, MIXED.rank), 1e-45)
    z[1] = 3e38
    assert MIXED.round_trip(z).isfinite().all()
    assert (MIXED.round_trip(z)[1] > 0).all()


def test_sizes() -> None:
    assert MIXED.rank == 256
    assert MIXED.num_blocks == 8
    assert MIXED.code_bytes == 32 + 48 + 16 + 36 + 8 + 4
    assert MIXED.slot_bytes(256) == 144 + 8
    assert MIXED.rank_of(152) == 256
    assert BandFormat(((32, 2),)).code_bytes == 16
    assert bands_of([3, 3, 2, 3]) == (Band(64, 3), Band(32, 2), Band(32, 3))


def test_pages_have_codes_then_scales() -> None:
    cache = torch.arange(2 * 16 * 152).to(torch.uint8).view(2, 16, 152)
    codes, scales = MIXED.split_cache(cache)
    assert codes.shape == (2, 16, 144)
    assert scales.shape == (2, 16, 8)
    page = cache[1].flatten()
    assert torch.equal(codes[1].flatten(), page[: 16 * 144])
    assert torch.equal(scales[1].flatten(), page[16 * 144 :])
    codes.zero_()
    assert not cache[0].flatten()[: 16 * 144].any()


def test_part_of_a_latent() -> None:
    z = torch.randn(5, MIXED.rank)
    span = Span(32, 224)
    part = MIXED.within(span)
    assert part.bands == MIXED.bands[1:4]
    codes, scales = MIXED.quantize(z)
    part_codes, part_scales = part.quantize(z[:, 32:224])
    assert torch.equal(codes[:, 32:224], part_codes)
    assert torch.equal(scales[:, 1:7], part_scales)
    offset = MIXED.code_offset(span)
    assert offset == 32
    packed = MIXED.pack(codes)[:, offset : offset + 48 + 16 + 36]
    assert torch.equal(packed, part.pack(part_codes)[:, :100])


@pytest.mark.parametrize("span", [Span(0, 64), Span(64, 96), Span(32, 32), Span(224, 288)])
def test_spans_that_cut_bands_are_refused(span: Span) -> None:
    message = r"bands: expected edges at both ends of the span .* found edges at 0, 32, 96, 128"
    with pytest.raises(ValueError, match=message):
        MIXED.within(span)
    with pytest.raises(ValueError, match=message):
        MIXED.code_offset(span)


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ((), "bands: expected one or more, found none"),
        (((48, 4),), "bands: expected positive multiples of 32 columns, found 48"),
        (((32, 4), (0, 4)), "bands: expected positive multiples of 32 columns, found 0"),
        (((32, 5),), "bands: expected 2, 3, 4, 6, 8 bits, found 5"),
    ],
)
def test_bands_that_there_are_not(bands: tuple[tuple[int, int], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BandFormat(bands)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="bands: expected a rank of 256, found 224"):
        MIXED.slot_bytes(224)
    with pytest.raises(ValueError, match="expected slots of 152 bytes, found 151"):
        MIXED.rank_of(151)
