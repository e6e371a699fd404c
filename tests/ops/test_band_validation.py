"""Bands and caches of bands that do not fit: an exception names argument, expected and found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recalkv_vllm import ops
from recalkv_vllm.band_format import BandFormat
from tests.ops.band_cases import banded
from tests.ops.cases import attend, build, caching_layer, spanned

PLAIN = spanned("valid", (4, 2, 64), 1, 32, 2, 32, batch=((1, 37), (2, 20)))
CASE = banded(PLAIN, ((32, 6), (32, 6), (32, 3), (32, 3)))
BANDS = CASE.latent_format


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        (((128, 4),), r"k_spans: bands: expected edges at both ends of the span \[0, 32\), found"),
        (
            ((32, 6), (32, 6), (64, 3)),
            r"v_spans: bands: .* \[64, 96\), found edges at 0, 32, 64, 128",
        ),
        (
            ((32, 6), (32, 6), (32, 3)),
            r"v_spans: bands: .* \[96, 128\), found edges at 0, 32, 64, 96",
        ),
        (((32, 6), (32, 4), (64, 3)), "latent_format: expected the same bands in all of k_spans"),
        (
            ((32, 6), (32, 6), (32, 3), (32, 2)),
            "latent_format: expected the same bands in all of v_spans, found 2",
        ),
    ],
)
def test_bands_that_do_not_fit_the_spans(bands: Any, message: str) -> None:
    inputs = build(CASE, torch.float32)
    attend(inputs)
    with pytest.raises(ValueError, match=message):
        attend(inputs.change(latent_format=BandFormat(bands)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.to(torch.int8), "kv_cache: expected dtype uint8, found int8"),
        (lambda x: x[..., :83], "kv_cache: expected contiguous blocks, found strides"),
        (lambda x: x[..., :83].contiguous(), "kv_cache: expected slots of 84 bytes, found 83"),
        (
            lambda x: x.view(-1)[24:-1320].view(-1, 16, 84),
            "kv_cache: expected blocks at multiples of 16 bytes, found offset 24",
        ),
    ],
)
def test_cache_of_bands(change: Any, message: str) -> None:
    inputs = build(CASE, torch.float32)
    assert inputs.kv_cache.shape[2] == 84
    with pytest.raises((TypeError, ValueError), match=message):
        attend(inputs.change(kv_cache=change(inputs.kv_cache)))


def test_update_of_a_cache_of_bands() -> None:
    cache = torch.zeros(2, 16, BANDS.slot_bytes(128), dtype=torch.uint8)
    slots = torch.tensor([0, 1])
    bound = ops.bind(caching_layer(BANDS))
    with pytest.raises(ValueError, match=r"z: expected shape \[tokens, 128\], found \[2, 96\]"):
        bound.update_cache(torch.ones(2, 96), cache, slots)
    with pytest.raises(ValueError, match="kv_cache: expected slots of 84 bytes, found 80"):
        bound.update_cache(torch.ones(2, 128), cache[..., :80].contiguous(), slots)
    assert not cache.any()
