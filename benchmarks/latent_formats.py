"""Formats of latents by the names that the kernel benchmark gives them."""

from __future__ import annotations

from recalkv_vllm.band_format import BLOCK_COLUMNS, BandFormat, CacheFormat, bands_of
from recalkv_vllm.latent_format import LatentFormat

from .geometries import Latent

#: Bits of a region's columns up to each share of them: 4 on average, all widths of codes.
SHARES = ((1 / 8, 8), (1 / 4, 6), (1 / 2, 4), (3 / 4, 3), (1, 2))


def misfit(latent: Latent, name: str) -> str | None:
    """Why latents cannot be stored in a format, or None."""
    if name == "bands" and any(region.width % BLOCK_COLUMNS for region in latent.regions):
        widths = f"{latent.k_width} and {latent.v_width}"
        return f"spans of {widths} columns are no multiples of {BLOCK_COLUMNS}"
    return None


def format_of(latent: Latent, name: str) -> CacheFormat | None:
    """The format of a name: ``auto`` is none, ``bands`` has all widths of codes in every region.

    Raises:
        ValueError: no such format.
    """
    if name == "auto":
        return None
    if name != "bands":
        return LatentFormat(name)
    bands = []
    for region in latent.regions:
        blocks = region.width // BLOCK_COLUMNS
        middles = [(i + 0.5) / blocks for i in range(blocks)]
        bands += bands_of([next(b for share, b in SHARES if x <= share) for x in middles])
    return BandFormat(tuple(bands))
