"""The format of quantized latents: sizes, packing, error bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recalkv_vllm.latent_format import BITS, GROUP_SIZES, LatentFormat

FORMATS = [LatentFormat(dtype, size) for dtype in BITS for size in (0, *GROUP_SIZES)]


@given(st.sampled_from(FORMATS), st.integers(1, 40), st.integers(0, 5), st.integers(-20, 20))
def test_error_is_at_most_half_a_step(
    form: LatentFormat, units: int, seed: int, magnitude: int
) -> None:
    rank = 16 * units
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(7, rank, generator=generator) * 2.0**magnitude
    z[0] = 0
    codes, scales = form.quantize(z)
    assert codes.shape == z.shape
    assert scales.shape == (7, form.num_groups(rank))
    back = form.dequantize(codes, scales)
    assert (back[0] == 0).all()
    size = form.group_size or rank
    largest = torch.stack([g.abs().amax(-1) for g in z.split(size, dim=-1)], dim=-1)
    bound = largest.repeat_interleave(size, dim=-1)[:, :rank]
    if form.dtype == "fp8":
        limit = torch.maximum(z.abs() * 2.0**-4, bound * 2.0**-9 / 448) * 1.01
    else:
        # Half a step, and what rounding the scale (to 2**-9 of it) cuts off the largest.
        limit = bound * (2.0**-form.bits + 2.0**-8)
    assert ((back - z).abs() <= limit).all()
    # What was read back is stored as it is, but for scales that its own largest number changes.
    assert torch.equal(form.unpack(form.pack(codes)), codes)
    assert form.pack(codes).shape == (7, form.code_bytes(rank))
    assert form.pack(codes).dtype == torch.uint8


def test_codes_of_known_numbers() -> None:
    form = LatentFormat("int4", 16)
    z = torch.tensor([8.0, -8.0, 0.4, -0.4, 7.3, -7.3, 1.0, -1.0] + [0.0] * 8)
    codes, scales = form.quantize(z)
    assert scales.tolist() == [1.0]
    assert codes[:8].tolist() == [15, 0, 8, 7, 15, 0, 9, 7]
    assert form.dequantize(codes, scales)[:4].tolist() == [7.5, -7.5, 0.5, -0.5]
    assert form.pack(codes)[:2].tolist() == [0x0F, 0x78]
    three = LatentFormat("int3", 16)
    codes = torch.arange(16, dtype=torch.uint8) % 8
    assert three.pack(codes).tolist() == [0xE4, 0xE4, 0xE4, 0xE4, 0xF0, 0xF0]


def test_not_a_number_stays_one() -> None:
    z = torch.ones(2, 32)
    z[0, 3] = torch.nan
    for form in FORMATS:
        back = form.round_trip(z)
        assert back[0, :16].isnan().all()
        assert back[1].isfinite().all()


@given(st.sampled_from(FORMATS), st.integers(1, 200))
def test_rank_follows_from_slot_bytes(form: LatentFormat, units: int) -> None:
    assert form.rank_of(form.slot_bytes(16 * units)) == 16 * units


def test_sizes() -> None:
    # 75 % of SmolLM2's 384 numbers at 4 bits: 21 % of the bytes in bf16.
    assert LatentFormat("int4").slot_bytes(288) == 144 + 18
    assert LatentFormat("int3").slot_bytes(32) == 12 + 2
    assert LatentFormat("int8", 0).slot_bytes(48) == 50


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"dtype": "int5", "group_size": 32}, "dtype: expected one of int8.*found 'int5'"),
        ({"dtype": "int4", "group_size": 24}, "group_size: expected 0 or one of 16.*found 24"),
        ({"dtype": "int4"}, "expected dtype and group_size"),
        ({"dtype": "int4", "group_size": "32"}, "expected dtype and group_size"),
    ],
)
def test_unknown_formats_are_refused(raw: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentFormat.from_dict(raw)


def test_format_is_read_back() -> None:
    for form in FORMATS:
        assert LatentFormat.from_dict(form.to_dict()) == form
    with pytest.raises(ValueError, match="expected the slot bytes of a rank"):
        LatentFormat("int4").rank_of(13)
