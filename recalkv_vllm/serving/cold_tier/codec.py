"""Chunks as few bytes: distances from predictions, columns of a class together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np

from recalkv_vllm.serving.cold_tier.chunk_layout import Bytes, ChunkLayout, Latents
from recalkv_vllm.serving.cold_tier.entropy import (
    compress,
    compress_bytes,
    decompress,
    decompress_bytes,
)
from recalkv_vllm.serving.cold_tier.predictor import (
    Floats,
    LayerPredictor,
    half_ranges,
    seen_from_above,
)


class Codec:
    """Encodes chunks of one layout with one predictor; several at once are faster.

    An encoded chunk is the sizes of its parts (uint32), and its parts: distances of each class of
    columns, scales as differences from the usual ones, and the rest.
    """

    def __init__(self, layout: ChunkLayout, predictors: Sequence[LayerPredictor]):
        self.layout = layout
        self.predictors = predictors
        self._half = [half_ranges(pages.latents) for pages in layout.layers]

    def encode(self, chunks: Bytes) -> list[bytes]:
        """Of each of ``chunks: [chunks, layout.size]``."""
        layers, rest = self.layout.split(chunks)
        tokens = layers[0].codes.shape[1]
        distances, scales = [], []
        integers = None
        for i, latents in enumerate(layers):
            below = self._below(i, integers, tokens)
            found, integers = self.predictors[i].encode(latents, below, self._half[i])
            distances.append(found)
            scales.append(latents.scales - self.predictors[i].scales)
        by_class, of_scales = np.concatenate(distances)[self._order], np.concatenate(scales)
        encoded = []
        for i, part in enumerate(self._parts_of_chunks(len(chunks))):
            parts = [compress(by_class[rows, part], bits) for rows, bits in self._classes]
            parts += [compress_bytes(of_scales[:, part]), compress_bytes(rest[i])]
            sizes = np.array([len(one) for one in parts], "<u4")
            encoded.append(b"".join([sizes.tobytes(), *parts]))
        return encoded

    def decode(self, encoded: Sequence[bytes]) -> Bytes:
        """Inverse of :meth:`encode`.

        Raises:
            ValueError: one is damaged.
        """
        tokens = len(encoded) * self.layout.tokens
        by_class = np.empty((len(self._order), tokens), np.uint8)
        of_scales = np.empty((self._blocks[-1], tokens), np.uint8)
        rests = []
        for data, part in zip(encoded, self._parts_of_chunks(len(encoded)), strict=True):
            parts = self._cut(data)
            for (rows, bits), one in zip(self._classes, parts, strict=False):
                shape = (rows.stop - rows.start, self.layout.tokens)
                by_class[rows, part] = decompress(one, bits, shape[0] * shape[1]).reshape(shape)
            scale_bytes = decompress_bytes(parts[-2], len(of_scales) * self.layout.tokens)
            of_scales[:, part] = scale_bytes.reshape(len(of_scales), -1)
            rests.append(decompress_bytes(parts[-1], self.layout.rest_bytes))
        distances = np.empty_like(by_class)
        distances[self._order] = by_class
        layers: list[Latents] = []
        integers = None
        for i, predictor in enumerate(self.predictors):
            columns, blocks = slice(*self._columns[i : i + 2]), slice(*self._blocks[i : i + 2])
            scales = of_scales[blocks] + predictor.scales
            below = self._below(i, integers, tokens)
            codes, integers = predictor.decode(distances[columns], scales, below, self._half[i])
            layers.append(Latents(codes, scales))
        return self.layout.join(layers, np.stack(rests))

    def _below(self, layer: int, integers: Floats | None, tokens: int) -> Floats:
        latents = (
            None if self.layout.layers[layer].lowest else self.layout.layers[layer - 1].latents
        )
        return seen_from_above(integers, latents, tokens)

    def _parts_of_chunks(self, count: int) -> Iterator[slice]:
        """The tokens of each chunk."""
        for start in range(0, count * self.layout.tokens, self.layout.tokens):
            yield slice(start, start + self.layout.tokens)

    def _cut(self, data: bytes) -> list[memoryview]:
        count = len(self._classes) + 2
        ends = np.cumsum(np.frombuffer(data[: 4 * count], "<u4"), dtype=np.int64) + 4 * count
        if len(ends) != count or ends[-1] != len(data):
            raise ValueError(f"expected {count} parts, found others")
        view = memoryview(data)
        return [view[start:end] for start, end in pairwise([4 * count, *map(int, ends)])]

    @cached_property
    def _columns(self) -> list[int]:
        """The first of each layer's columns among those of all layers, and their number."""
        return [0, *map(int, np.cumsum([len(half) for half in self._half]))]

    @cached_property
    def _blocks(self) -> list[int]:
        """The same of scales."""
        counts = [pages.latents.num_blocks for pages in self.layout.layers]
        return [0, *map(int, np.cumsum(counts))]

    @cached_property
    def _keys(self) -> np.ndarray:
        """Class and largest code of every column, as one number."""
        largest = np.concatenate(self._half)[:, 0].astype(np.int64) * 2 - 1
        return np.concatenate([p.classes for p in self.predictors]).astype(np.int64) << 8 | largest

    @cached_property
    def _order(self) -> np.ndarray:
        """Columns of all layers, sorted by class."""
        return np.argsort(self._keys, kind="stable")

    @cached_property
    def _classes(self) -> list[tuple[slice, int]]:
        """Of every class: its place in :attr:`_order`, and the bits of its codes."""
        keys, starts = np.unique(self._keys[self._order], return_index=True)
        edges = [*map(int, starts), len(self._order)]
        return [
            (slice(start, end), int(key & 0xFF).bit_length())
            for key, (start, end) in zip(keys, pairwise(edges), strict=True)
        ]
