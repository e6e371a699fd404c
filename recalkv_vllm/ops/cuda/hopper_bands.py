"""Where the CUDA kernel for Hopper finds latents in bands: tables of blocks of 32 columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch

from recalkv_vllm.band_format import BLOCK_COLUMNS, PLANES, BandFormat, band_bytes
from recalkv_vllm.ops.cuda.plan import v_blocks
from recalkv_vllm.ops.cuda.shapes import LayerShape
from recalkv_vllm.span import Span

#: Bits of a block whose slot has columns in their own order.
NEIGHBORS = 8
#: Bytes of a chunk that is copied at once.
CHUNK = 16


class Slots(NamedTuple):
    """Blocks of 32 columns in the order in which a block of threads has them in shared memory.

    Args:
        keys: those of the K span, by their numbers: those that are no values first.
        others: the other ones of its part of the V span.
        first_value: the slot of the first that is a value; all after it are.
    """

    keys: tuple[int, ...]
    others: tuple[int, ...]
    first_value: int

    @property
    def values(self) -> tuple[int, ...]:
        return (*self.keys, *self.others)[self.first_value :]


class Place(NamedTuple):
    """Where a block's codes are in a token's: first byte and size of its part of each plane."""

    bits: int
    parts: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class BandTables:
    """What every block of threads reads, by V block and KV head.

    Args:
        sources: chunks of 16 bytes of a token's codes, by their numbers.
        slots: blocks of columns.
        places: where every block's codes are.
        k_starts: the first block of each head's K span.
        v_starts: that of the V span, by V block and KV head.
    """

    sources: tuple[tuple[int, ...], ...]
    slots: tuple[Slots, ...]
    places: tuple[Place, ...]
    k_starts: tuple[int, ...]
    v_starts: tuple[int, ...]

    @property
    def num_heads(self) -> int:
        return len(self.k_starts)

    @property
    def token_scales(self) -> int:
        """Of a token in the cache."""
        return len(self.places)

    @property
    def tile_width(self) -> int:
        """Columns of 16 bits in a row of a tile; an even number of chunks."""
        return max(-(-len(chunks) // 2) * CHUNK for chunks in self.sources)

    @property
    def most_blocks(self) -> int:
        """Blocks of 32 columns that a block of threads reads at most."""
        return max(len(slots.keys) + len(slots.others) for slots in self.slots)

    @property
    def k_columns(self) -> torch.Tensor:
        """``[h_kv, v_blocks, k_width]``: columns of the K span in the order of its slots."""
        heads = range(self.num_heads)
        columns = [
            [
                [
                    (number - self.k_starts[head]) * BLOCK_COLUMNS + column
                    for number in slots.keys
                    for column in slot_order(self.places[number].bits)
                ]
                for slots in self.slots[head :: self.num_heads]
            ]
            for head in heads
        ]
        return torch.tensor(columns)

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
        """``[v_blocks, h_kv, 12 + 5 most_blocks]`` int32, rows padded to multiples of 16 bytes.

        Numbers of K's blocks and of all, the first value's slot and a zero; four numbers a block,
        and zeros after K's and after the others: its bits, where its planes are in a row of the
        tile, its scale's number; then of each slot of values twice its block, counted from the V
        span's first, and one more where the slot has columns in their own order.
        """
        most = self.most_blocks
        width = -(-(12 + 5 * most) // 4) * 4
        rows = []
        for slots, chunks, v_start in zip(self.slots, self.sources, self.v_starts, strict=True):
            row = [len(slots.keys), len(slots.keys) + len(slots.others), slots.first_value, 0]
            for numbers in (slots.keys, slots.others):
                for number in numbers:
                    bits, parts = self.places[number]
                    offsets = [chunks.index(at // CHUNK) * CHUNK + at % CHUNK for at, _ in parts]
                    row += [bits, offsets[0], offsets[-1], number]
                row += [0] * 4
            row += [0] * (4 * most + 12 - len(row))
            row += [
                2 * (number - v_start) + (self.places[number].bits == NEIGHBORS)
                for number in slots.values
            ]
            rows.append([*row, *[0] * (width - len(row))])
        return torch.tensor(rows, dtype=torch.int32).view(-1, self.num_heads, width)


def band_tables(layer: LayerShape, bands: BandFormat, v_tiles: int) -> BandTables:
    """Tables of a layer, for blocks of threads that own ``16 · v_tiles`` V columns."""
    places = plane_places(bands)
    sources, slots, v_starts = [], [], []
    for part, head in product(v_blocks(layer, v_tiles), range(len(layer.k_spans))):
        start = layer.v_spans[head].start
        v_span = Span(start + part.start, start + part.end)
        own = slots_of(layer.k_spans[head], v_span, places)
        chunks = {
            byte // CHUNK
            for number in (*own.keys, *own.others)
            for first, size in places[number].parts
            for byte in range(first, first + size, 4)
        }
        sources.append(tuple(sorted(chunks)))
        slots.append(own)
        v_starts.append(v_span.start // BLOCK_COLUMNS)
    k_starts = tuple(span.start // BLOCK_COLUMNS for span in layer.k_spans)
    return BandTables(tuple(sources), tuple(slots), places, k_starts, tuple(v_starts))


def slots_of(k_span: Span, v_span: Span, places: Sequence[Place]) -> Slots:
    """Blocks of two spans; of each kind those with most bits first, as the kernel asks for them."""
    keys, values = set(block_numbers(k_span)), set(block_numbers(v_span))

    def order(numbers: set[int]) -> tuple[int, ...]:
        return tuple(sorted(numbers, key=lambda number: (-places[number].bits, number)))

    no_values = order(keys - values)
    return Slots((*no_values, *order(keys & values)), order(values - keys), len(no_values))


def slot_order(bits: int) -> Sequence[int]:
    """Columns of a block of 32 in the order of its slot: pairs 4 apart, or neighbors; see
    hopper_bands.cuh."""
    if bits == NEIGHBORS:
        return range(BLOCK_COLUMNS)
    return [
        eight + pair + i
        for eight in range(0, BLOCK_COLUMNS, 8)
        for pair in range(4)
        for i in (0, 4)
    ]


def block_numbers(span: Span) -> range:
    """The blocks of 32 columns that a span covers."""
    return range(span.start // BLOCK_COLUMNS, span.end // BLOCK_COLUMNS)


def plane_places(bands: BandFormat) -> tuple[Place, ...]:
    """Of every block."""
    places = []
    offset = 0
    for band in bands.bands:
        for i in range(band.columns // BLOCK_COLUMNS):
            parts, plane_start = [], offset
            for bits in PLANES[band.bits]:
                size = BLOCK_COLUMNS * bits // 8
                parts.append((plane_start + i * size, size))
                plane_start += band.columns * bits // 8
            places.append(Place(band.bits, tuple(parts)))
        offset += band_bytes(band)
    return tuple(places)
