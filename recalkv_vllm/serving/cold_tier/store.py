"""Encoded chunks in a folder, and the predictor that it learns from the first of them."""

from __future__ import annotations

import hashlib
import logging
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from recalkv_vllm.serving.cold_tier.chunk_file import (
    COMPRESSED,
    UNCHANGED,
    DamagedChunkError,
    StoredChunk,
    write,
)
from recalkv_vllm.serving.cold_tier.chunk_layout import Bytes, ChunkLayout
from recalkv_vllm.serving.cold_tier.codec import Codec
from recalkv_vllm.serving.cold_tier.entropy import compress_bytes, decompress_bytes
from recalkv_vllm.serving.cold_tier.fit import fit
from recalkv_vllm.serving.cold_tier.predictor_file import (
    DIGEST_BYTES,
    digest,
    dump,
    parse,
)

logger = logging.getLogger(__name__)

#: Tokens that a predictor is fitted to: several of each of the elements that it predicts from.
FIT_TOKENS = 8192


class ColdStore:
    """Chunks of one layout. Its methods may be called by several threads.

    Args:
        folder: where predictors are.
        layout: None: chunks are compressed without knowing what they are.
        size: bytes of a chunk.
        factors: what tells the checkpoint from others.
    """

    def __init__(self, folder: Path, layout: ChunkLayout | None, size: int, factors: str = ""):
        self._folder, self._layout, self._size = folder, layout, size
        self._digest = hashlib.blake2b(
            repr((layout, size, factors)).encode(), digest_size=DIGEST_BYTES
        ).digest()
        self._codecs: dict[bytes, Codec] = {}
        self._lock = threading.Lock()
        self._samples: list[tuple[Path, Bytes]] = []
        #: Digest of the predictor that new chunks are stored with.
        self._current = self._newest_predictor() if layout else None

    def store(self, paths: Sequence[Path], chunks: Bytes) -> int:
        """Write ``chunks: [chunks, size]``; returns the bytes of their files."""
        with self._lock:
            current = self._current
            if self._layout is not None and current is None:
                self._samples += [(p, c.copy()) for p, c in zip(paths, chunks, strict=True)]
                if len(self._samples) * self._layout.tokens >= FIT_TOKENS:
                    # Samples are written again, smaller.
                    paths = [path for path, _ in self._samples]
                    chunks = np.stack([chunk for _, chunk in self._samples])
                    self._samples = []
                    current = self._current = self._fit(chunks)
        written = 0
        for path, contents in zip(paths, self._encode(chunks, current), strict=True):
            write(path, contents)
            written += len(contents)
        return written

    def load(self, paths: Sequence[Path]) -> tuple[Bytes, str | None]:
        """Chunks ``[n, size]`` of the first files that can be read, and what is wrong with the
        next; None if nothing is."""
        stored: list[StoredChunk] = []
        wrong = None
        for path in paths:
            try:
                stored.append(self._read(path))
            except (OSError, DamagedChunkError) as error:
                wrong = f"{path}: {error}"
                break
        chunks = np.empty((len(stored), self._size), np.uint8)
        for predictor in {one.predictor for one in stored}:
            which = [i for i, one in enumerate(stored) if one.predictor == predictor]
            for i, chunk in zip(which, self._decode([stored[i] for i in which]), strict=True):
                chunks[i] = chunk
        for i, one in enumerate(stored):
            if zlib.crc32(chunks[i]) != one.checksum:
                return chunks[:i], f"{paths[i]}: expected other latents: the checksum differs"
        return chunks, wrong

    def _encode(self, chunks: Bytes, predictor: bytes | None) -> list[bytes]:
        if predictor is None:
            bodies = [compress_bytes(chunk) for chunk in chunks]
        else:
            bodies = self._codecs[predictor].encode(chunks)
        contents = []
        for chunk, body in zip(chunks, bodies, strict=True):
            kind = predictor or COMPRESSED
            if len(body) >= self._size:
                kind, body = UNCHANGED, chunk.tobytes()
            stored = StoredChunk(kind, self._digest, self._size, zlib.crc32(chunk), body)
            contents.append(stored.dump())
        return contents

    def _read(self, path: Path) -> StoredChunk:
        stored = StoredChunk.load(path.read_bytes())
        if stored.layout != self._digest or stored.size != self._size:
            raise DamagedChunkError("expected latents of this checkpoint, found others")
        if stored.predictor not in (UNCHANGED, COMPRESSED):
            self._codec(stored.predictor)
        return stored

    def _decode(self, stored: Sequence[StoredChunk]) -> Sequence[Bytes]:
        """Chunks of one predictor."""
        predictor = stored[0].predictor
        if predictor == UNCHANGED:
            return [np.frombuffer(one.body, np.uint8) for one in stored]
        if predictor == COMPRESSED:
            return [decompress_bytes(one.body, self._size) for one in stored]
        return [*self._codecs[predictor].decode([one.body for one in stored])]

    def _fit(self, chunks: Bytes) -> bytes:
        assert self._layout is not None
        predictors = fit(self._layout, chunks)
        contents = dump(predictors)
        name = digest(contents)
        write(self._predictor_path(name), contents)
        self._codecs[name] = Codec(self._layout, predictors)
        logger.info("Cold tier: fitted %s to %d chunks", self._predictor_path(name), len(chunks))
        return name

    def _codec(self, predictor: bytes) -> Codec:
        """Of a predictor, which another engine may have fitted.

        Raises:
            DamagedChunkError: its file is not what it was.
        """
        with self._lock:
            if predictor not in self._codecs:
                contents = self._predictor_path(predictor).read_bytes()
                if self._layout is None or digest(contents) != predictor:
                    raise DamagedChunkError("its predictor's file is damaged")
                self._codecs[predictor] = Codec(self._layout, parse(contents))
            return self._codecs[predictor]

    def _predictor_path(self, predictor: bytes) -> Path:
        return self._folder / f"predictor-{self._digest.hex()}-{predictor.hex()}.npz"

    def _newest_predictor(self) -> bytes | None:
        pattern = f"predictor-{self._digest.hex()}-*.npz"
        for path in sorted(self._folder.glob(pattern), key=lambda p: p.stat().st_mtime)[::-1]:
            predictor = bytes.fromhex(path.stem.rpartition("-")[2])
            try:
                self._codec(predictor)
            except DamagedChunkError as error:
                logger.warning("Cold tier: %s: %s", path, error)
                continue
            return predictor
        return None
