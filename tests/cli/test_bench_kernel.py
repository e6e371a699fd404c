"""Formats of latents that the kernel benchmark makes up."""

from __future__ import annotations

import pytest

from recalkv_vllm.band_format import PLANES, BandFormat
from recalkv_vllm.benchmarks.geometries import GEOMETRIES, SPANS, latent_of
from recalkv_vllm.benchmarks.latent_formats import format_of, misfit
from recalkv_vllm.latent_format import LatentFormat

LLAMA = GEOMETRIES["llama-3.1-8b"]


@pytest.mark.parametrize("spans", SPANS)
def test_bands_are_of_all_widths_and_4_bits_on_average(spans: str) -> None:
    latent = latent_of(LLAMA, 0.5, 4, spans)
    assert misfit(latent, "bands") is None
    bands = format_of(latent, "bands")
    assert isinstance(bands, BandFormat)
    assert bands.rank == latent.rank
    assert {band.bits for band in bands.bands} == set(PLANES)
    # Six blocks, of nested keys, do not divide into the shares.
    assert bands.code_bytes * 8 == pytest.approx(4 * latent.rank, rel=0.07)
    for groups in (latent.k_spans, latent.v_spans):
        assert len({bands.within(span) for span in groups}) == 1


def test_spans_that_bands_do_not_fill() -> None:
    latent = latent_of(LLAMA, 0.625, 1, "split")
    assert latent.k_width == 48
    reason = misfit(latent, "bands")
    assert reason == "spans of 48 and 48 columns are no multiples of 32"
    assert misfit(latent, "int4") is None
    assert format_of(latent, "int4") == LatentFormat("int4")
    assert format_of(latent, "auto") is None
