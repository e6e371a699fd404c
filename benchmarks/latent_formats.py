"""Formats of latents by the names that the kernel benchmark gives them."""

from __future__ import annotations

from recalkv_vllm.band_format import BLOCK_COLUMNS, BandFormat, CacheFormat, bands_of
from recalkv_vllm.latent_format import LatentFormat

from .geometries import Latent

#: Bits of a span's columns up to each share of them: 4 on average, all widths of codes.
SHARES = ((1 / 8, 8), (1 / 4, 6), (1 / 2, 4), (3 / 4, 3), (1, 2))


def misfit(latent: Latent, name: str) -> str | None:
    """Why latents cannot be stored in a format, or None."""
    widths = (latent.k_width, latent.v_width)
    if name == "bands" and any(width % BLOCK_COLUMNS for width in widths):
        return f"spans of {widths[0]} and {widths[1]} columns are no multiples of {BLOCK_COLUMNS}"
    return None


def format_of(latent: Latent, name: str) -> CacheFormat | None:
    """The format of a name: ``auto`` is none, ``bands`` has all widths of codes in every span.

    Raises:
        ValueError: no such format.
    """
    if name == "auto":
        return None
    if name != "bands":
        return LatentFormat(name)
    bands = []
    for span in sorted({*latent.k_spans, *latent.v_spans}):
        blocks = span.width // BLOCK_COLUMNS
        middles = [(i + 0.5) / blocks for i in range(blocks)]
        bands += bands_of([next(b for share, b in SHARES if x <= share) for x in middles])
    return BandFormat(tuple(bands))
