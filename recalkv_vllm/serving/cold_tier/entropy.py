"""Symbols in few bits: the Huffman coder of Zstandard, one table for alike symbols."""

from __future__ import annotations

import numpy as np
import torch
import zstandard

from recalkv_vllm.latent_format import pack_bits, unpack_bits
from recalkv_vllm.serving.cold_tier.chunk_layout import Bytes

#: Symbols have no repetitions worth looking for.
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(
    1, min_match=7, write_checksum=False, write_content_size=True
)


def compress(symbols: Bytes, bits: int) -> bytes:
    """Symbols below ``2**bits``, of any shape; several share a byte, and so a Huffman code."""
    flat = symbols.reshape(-1)
    whole_bytes = np.pad(flat, (0, -len(flat) % (8 // bits)))
    return compress_bytes(pack_bits(torch.from_numpy(whole_bytes), bits).numpy())


def decompress(data: bytes | memoryview, bits: int, count: int) -> Bytes:
    """``count`` symbols: inverse of :func:`compress`.

    Raises:
        ValueError: ``data`` is damaged.
    """
    packed = decompress_bytes(data, -(-count // (8 // bits)))
    # A copy: torch warns of memory that it may not write.
    return unpack_bits(torch.from_numpy(packed.copy()), bits).numpy()[:count]


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
