"""What each layer caches, by the bits of its columns, and which part of it keys and values read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from recalkv_vllm.band_format import BLOCK_COLUMNS, BandFormat, CacheFormat, token_bytes
from recalkv_vllm.checkpoint import AttentionGeometry, LatentLayout, RecalkvConfig
from recalkv_vllm.span import Span


@dataclass(frozen=True, slots=True)
class Part:
    """Columns of a latent that are stored in the same number of bits.

    Args:
        bits: of a code, or of a plain element.
        columns: how many.
        bytes: per token, with their scales, without a token's padding.
    """

    bits: int
    columns: int
    bytes: float


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer's cache; parts have most bits first.

    Args:
        stored_bytes: per token, with padding.
        dense_bytes: per token of keys and values.
        stored: all columns.
        keys: those that some K span reads.
        values: those that some V span reads.
    """

    layer: int
    rank: int
    stored_bytes: int
    dense_bytes: int
    stored: list[Part]
    keys: list[Part]
    values: list[Part]


def layer_rows(
    recalkv: RecalkvConfig, geometry: AttentionGeometry, itemsize: int
) -> list[LayerRow]:
    """Rows of all layers; ``itemsize`` is bytes of a plain element."""
    return [
        _row(i, layout, recalkv.latent_format(i), geometry, itemsize)
        for i, layout in enumerate(recalkv.layers)
    ]


def _row(
    layer: int,
    layout: LatentLayout,
    latent_format: CacheFormat | None,
    geometry: AttentionGeometry,
    itemsize: int,
) -> LayerRow:
    bits = _column_bits(layout, latent_format, itemsize)
    scale_bytes = _scale_bytes(latent_format)

    def parts(columns: Iterable[int]) -> list[Part]:
        counts = Counter(bits[column] for column in columns)
        return [Part(b, n, n * (b / 8 + scale_bytes)) for b, n in sorted(counts.items())[::-1]]

    return LayerRow(
        layer=layer,
        rank=layout.rank,
        stored_bytes=token_bytes(latent_format, layout.rank, itemsize, geometry.key_scales()),
        dense_bytes=geometry.dense_width * itemsize,
        stored=parts(range(layout.rank)),
        keys=parts(_covered(layout.k_spans)),
        values=parts(_covered(layout.v_spans)),
    )


def _column_bits(
    layout: LatentLayout, latent_format: CacheFormat | None, itemsize: int
) -> list[int]:
    if latent_format is None:
        return [8 * itemsize] * layout.rank
    if isinstance(latent_format, BandFormat):
        return [band.bits for band in latent_format.bands for _ in range(band.columns)]
    return [latent_format.bits] * layout.rank


def _scale_bytes(latent_format: CacheFormat | None) -> float:
    """Of each column's share in a scale: a byte for a block of a band, else bfloat16."""
    if latent_format is None:
        return 0.0
    if isinstance(latent_format, BandFormat):
        return 1 / BLOCK_COLUMNS
    return 2 / latent_format.group_size


def _covered(spans: Iterable[Span]) -> set[int]:
    """Columns in at least one span."""
    return {column for start, end in spans for column in range(start, end)}
