"""Symbols in few bits: the Huffman coder of Zstandard, one table for alike symbols."""

from __future__ import annotations

import numpy as np
import zstandard

from recalkv_vllm.serving.cold_tier.chunk_layout import Bytes

#: Symbols have no repetitions worth looking for.
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(
    1, min_match=7, write_checksum=False, write_content_size=True
)


def compress(symbols: Bytes, bits: int) -> bytes:
    """Symbols below ``2**bits``, of any shape; several share a byte, and so a Huffman code."""
    return compress_bytes(_several_to_a_byte(symbols.reshape(-1), bits))


def decompress(data: bytes | memoryview, bits: int, count: int) -> Bytes:
    """``count`` symbols: inverse of :func:`compress`.

    Raises:
        ValueError: ``data`` is damaged.
    """
    per_byte = 8 // bits
    packed = decompress_bytes(data, -(-count // per_byte))
    if per_byte == 1:
        return packed
    symbols = np.empty((len(packed), per_byte), np.uint8)
    for i in range(per_byte):
        symbols[:, i] = packed >> (i * bits) & ((1 << bits) - 1)
    return symbols.reshape(-1)[:count]


def compress_bytes(data: Bytes) -> bytes:
    """Of any bytes."""
    return zstandard.ZstdCompressor(compression_params=_PARAMETERS).compress(
        np.ascontiguousarray(data).data
    )


def decompress_bytes(data: bytes | memoryview, size: int) -> Bytes:
    """``size`` bytes: inverse of :func:`compress_bytes`.

    Raises:
        ValueError: ``data`` is damaged.
    """
    try:
        # Not what the frame says: a damaged one could ask for any amount of memory.
        if zstandard.frame_content_size(data) != size:
            raise ValueError(f"expected {size} compressed bytes")
        plain = zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    return np.frombuffer(plain, np.uint8)


def _several_to_a_byte(symbols: Bytes, bits: int) -> Bytes:
    per_byte = 8 // bits
    if per_byte == 1:
        return symbols
    padded = np.zeros(-(-len(symbols) // per_byte) * per_byte, np.uint8)
    padded[: len(symbols)] = symbols
    packed = np.zeros(len(padded) // per_byte, np.uint8)
    for i in range(per_byte):
        packed |= padded[i::per_byte] << (i * bits)
    return packed
