"""Where codes and scales lie in a chunk, the bytes that vLLM offloads as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from recalkv_vllm.band_format import BandFormat

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class LayerPages:
    """One layer's pages in a chunk.

    Args:
        starts: first bytes of its pages, as many in every layer.
        block_size: tokens of a page.
        latents: how they are stored.
        lowest: no layer below it, of its tensor-parallel rank, is in the chunk.
    """

    starts: tuple[int, ...]
    block_size: int
    latents: BandFormat
    lowest: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a chunk."""
        return len(self.starts) * self.block_size


@dataclass(frozen=True)
class Latents:
    """What chunks hold of one layer; tokens are those of all chunks, one after the other.

    Args:
        codes: ``[rank, tokens]``.
        scales: ``[blocks, tokens]``, bytes.
    """

    codes: Bytes
    scales: Bytes


@dataclass(frozen=True)
class ChunkLayout:
    """All pages of a chunk of ``size`` bytes, layer after layer.

    Bytes that are of no code and no scale, such as padding, are the *rest*.
    """

    size: int
    layers: tuple[LayerPages, ...]

    @cached_property
    def tokens(self) -> int:
        """Tokens of a chunk."""
        return self.layers[0].tokens

    @cached_property
    def _in_rest(self) -> npt.NDArray[np.bool_]:
        in_rest = np.ones((1, self.size), bool)
        for layer in self.layers:
            for codes, scales in _pages(in_rest, layer):
                codes[..., : layer.latents.used_bytes] = False
                scales[...] = False
        return in_rest[0]

    @cached_property
    def rest_bytes(self) -> int:
        """Of a chunk."""
        return int(self._in_rest.sum())

    def split(self, chunks: Bytes) -> tuple[list[Latents], Bytes]:
        """Latents of every layer, and the rest ``[chunks, bytes]``, of ``[chunks, size]``."""
        layers = []
        for layer in self.layers:
            codes, scales = zip(*_pages(chunks, layer), strict=True)
            packed = _columns_first(codes)[: layer.latents.used_bytes]
            layers.append(Latents(_unpack(packed, layer.latents), _columns_first(scales)))
        return layers, chunks[:, self._in_rest]

    def join(self, layers: Sequence[Latents], rest: Bytes) -> Bytes:
        """Inverse of :meth:`split`."""
        chunks = np.empty((len(rest), self.size), np.uint8)
        chunks[:, self._in_rest] = rest
        for layer, latents in zip(self.layers, layers, strict=True):
            shape = (len(chunks), len(layer.starts), layer.block_size, -1)
            packed = _pack(latents.codes, layer.latents).T.reshape(shape)
            scale_bytes = latents.scales.T.reshape(shape)
            for i, (codes, scales) in enumerate(_pages(chunks, layer)):
                codes[..., : packed.shape[-1]] = packed[:, i]
                scales[...] = scale_bytes[:, i]
        return chunks


def _pages(chunks: npt.NDArray, layer: LayerPages) -> Iterator[tuple[npt.NDArray, npt.NDArray]]:
    """Views of each page's codes ``[chunks, block_size, code_bytes]`` and scales."""
    latents, shape = layer.latents, (len(chunks), layer.block_size, -1)
    for start in layer.starts:
        cut = start + layer.block_size * latents.code_bytes
        end = cut + layer.block_size * latents.num_blocks
        yield chunks[:, start:cut].reshape(shape), chunks[:, cut:end].reshape(shape)


def _columns_first(pages: Sequence[Bytes]) -> Bytes:
    """``[bytes, tokens]``, contiguous, of pages ``[chunks, block_size, bytes]``."""
    tokens = np.stack(pages, axis=1)
    return np.ascontiguousarray(tokens.reshape(-1, tokens.shape[-1]).T)


def _unpack(packed: Bytes, latents: BandFormat) -> Bytes:
    """Codes ``[rank, tokens]`` of packed ones ``[bytes, tokens]``.

    ``BandFormat.unpack`` with columns first, for speed: a byte of all tokens is one row.
    """
    codes = np.zeros((latents.rank, packed.shape[1]), np.uint8)
    for columns, part, bits, shift in latents.planes():
        per_byte = 8 // bits
        for i in range(per_byte):
            units = packed[part] >> (i * bits) & ((1 << bits) - 1)
            codes[columns][i::per_byte] |= units << shift
    return codes


def _pack(codes: Bytes, latents: BandFormat) -> Bytes:
    """Inverse of :func:`_unpack`."""
    packed = np.zeros((latents.used_bytes, codes.shape[1]), np.uint8)
    for columns, part, bits, shift in latents.planes():
        per_byte = 8 // bits
        for i in range(per_byte):
            units = codes[columns][i::per_byte] >> shift & ((1 << bits) - 1)
            packed[part] |= units << (i * bits)
    return packed
