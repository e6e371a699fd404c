"""Where the CUDA kernel for Hopper finds latents in bands: tables of blocks of 32 columns."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

from recalkv_vllm.band_format import BLOCK_COLUMNS, PLANES, BandFormat, band_bytes
from recalkv_vllm.ops.cuda.plan import v_blocks
from recalkv_vllm.ops.cuda.shapes import LayerShape
from recalkv_vllm.span import Span

#: Bytes of a chunk that is copied at once.
CHUNK = 16


@dataclass(frozen=True, slots=True)
class BandTables:
    """What every block of threads reads, by V block and KV head.

    Args:
        sources: chunks of 16 bytes of a token's codes, by their numbers.
        blocks: :func:`block_row` of each.
        token_scales: scales of a token in the cache.
    """

    sources: tuple[tuple[int, ...], ...]
    blocks: tuple[tuple[int, ...], ...]
    num_heads: int
    token_scales: int

    @property
    def tile_width(self) -> int:
        """Columns of 16 bits in a row of a tile; an even number of chunks."""
        return max(-(-len(chunks) // 2) * CHUNK for chunks in self.sources)

    @property
    def most_blocks(self) -> int:
        """Blocks of 32 columns that a block of threads reads at most."""
        return max(len(row) for row in self.blocks) // 4 - 1

    def tile_columns(self) -> torch.Tensor:
        """As :func:`~.layout.tile_columns`, of chunks of codes."""
        most = self.tile_width // 8
        rows = [
            [0, len(chunks), 0, *(c * CHUNK // 2 for c in chunks), *[0] * (most - len(chunks))]
            for chunks in self.sources
        ]
        table = torch.tensor(rows, dtype=torch.int32)
        return table.view(-1, self.num_heads, table.shape[1])

    def band_blocks(self) -> torch.Tensor:
        """``[v_blocks, h_kv, 4 + 4 most_blocks]`` int32."""
        width = 4 + 4 * self.most_blocks
        rows = [[*row, *[0] * (width - len(row))] for row in self.blocks]
        return torch.tensor(rows, dtype=torch.int32).view(-1, self.num_heads, width)


def band_tables(layer: LayerShape, bands: BandFormat, v_tiles: int) -> BandTables:
    """Tables of a layer, for blocks of threads that own ``16 · v_tiles`` V columns."""
    places = plane_places(bands)
    sources, blocks = [], []
    heads = range(len(layer.k_spans))
    for part, head in product(v_blocks(layer, v_tiles), heads):
        start = layer.v_spans[head].start
        v_span = Span(start + part.start, start + part.end)
        wanted = sorted({*block_numbers(layer.k_spans[head]), *block_numbers(v_span)})
        chunks = sorted(
            {
                byte // CHUNK
                for number in wanted
                for first, size in places[number][1]
                for byte in range(first, first + size, 4)
            }
        )
        sources.append(tuple(chunks))
        blocks.append(block_row(layer.k_spans[head], v_span, wanted, places, chunks))
    return BandTables(tuple(sources), tuple(blocks), len(heads), bands.num_blocks)


def block_numbers(span: Span) -> range:
    """The blocks of 32 columns that a span covers."""
    return range(span.start // BLOCK_COLUMNS, span.end // BLOCK_COLUMNS)


def plane_places(bands: BandFormat) -> list[tuple[int, list[tuple[int, int]]]]:
    """Of every block: its bits, and the first byte and the size of its part of each plane."""
    places = []
    offset = 0
    for band in bands.bands:
        for i in range(band.columns // BLOCK_COLUMNS):
            parts, plane_start = [], offset
            for bits in PLANES[band.bits]:
                size = BLOCK_COLUMNS * bits // 8
                parts.append((plane_start + i * size, size))
                plane_start += band.columns * bits // 8
            places.append((band.bits, parts))
        offset += band_bytes(band)
    return places


def block_row(
    k_span: Span,
    v_span: Span,
    wanted: list[int],
    places: list[tuple[int, list[tuple[int, int]]]],
    chunks: list[int],
) -> tuple[int, ...]:
    """Numbers of K's blocks and of all, two zeros, and four numbers a block, K's first.

    A block has its bits, where its planes are in a row of the tile, and its scale's number with, 16
    bits higher, one more than its number in the V span (0: it is not in it).
    """
    of_k, of_v = block_numbers(k_span), block_numbers(v_span)
    order = [*of_k, *(number for number in wanted if number not in of_k)]
    row = [len(of_k), len(order), 0, 0]
    for number in order:
        bits, parts = places[number]
        offsets = [chunks.index(first // CHUNK) * CHUNK + first % CHUNK for first, _ in parts]
        value = number - of_v.start + 1 if number in of_v else 0
        row += [bits, offsets[0], offsets[-1], number | value << 16]
    return tuple(row)
