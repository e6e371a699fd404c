"""A chunk's file: a header that tells what was stored and whether all of it is there, and bytes."""

from __future__ import annotations

import os
import struct
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from recalkv_vllm.serving.cold_tier.predictor_file import DIGEST_BYTES

#: Chunks whose bytes are stored as they are name this predictor, and those that Zstandard alone
#: makes smaller this one.
UNCHANGED, COMPRESSED = b"\0" * DIGEST_BYTES, b"\1" + b"\0" * (DIGEST_BYTES - 1)

_MAGIC = b"RKVCOLD1"
#: Magic, predictor, layout, size of the chunk, its checksum, the body's checksum and size.
_HEADER = struct.Struct(f"<8s{DIGEST_BYTES}s{DIGEST_BYTES}sIIII")
HEADER_BYTES = _HEADER.size


class DamagedChunkError(ValueError):
    """A file that is not, or no longer, what was stored."""


@dataclass(frozen=True)
class StoredChunk:
    """A chunk as it is stored.

    Args:
        predictor: digest of the predictor's file, or :data:`UNCHANGED` or :data:`COMPRESSED`.
        layout: digest of what the bytes of a chunk are.
        size: bytes of the chunk.
        checksum: of the chunk.
        body: the encoded chunk.
    """

    predictor: bytes
    layout: bytes
    size: int
    checksum: int
    body: bytes

    def dump(self) -> bytes:
        """The contents of a file."""
        header = _HEADER.pack(
            _MAGIC,
            *(self.predictor, self.layout, self.size, self.checksum),
            *(zlib.crc32(self.body), len(self.body)),
        )
        # The header's own checksum, or a damaged one could name another chunk's size.
        return header + struct.pack("<I", zlib.crc32(header)) + self.body

    @classmethod
    def load(cls, contents: bytes) -> StoredChunk:
        """Inverse of :meth:`dump`.

        Raises:
            DamagedChunkError: the contents are not all, or not those of a chunk.
        """
        start = HEADER_BYTES + 4
        if len(contents) < start:
            raise DamagedChunkError(f"expected a header of {start} bytes, found {len(contents)}")
        header, body = contents[:HEADER_BYTES], contents[start:]
        magic, predictor, layout, size, checksum, of_body, length = _HEADER.unpack(header)
        if magic != _MAGIC or contents[HEADER_BYTES:start] != struct.pack("<I", zlib.crc32(header)):
            raise DamagedChunkError("expected the header of a chunk, found other bytes")
        if len(body) != length:
            raise DamagedChunkError(f"expected {length} bytes, found {len(body)}")
        if zlib.crc32(body) != of_body:
            raise DamagedChunkError("expected other bytes: the checksum differs")
        return cls(predictor, layout, size, checksum, body)


def write(path: Path, contents: bytes) -> None:
    """Write a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(contents)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
