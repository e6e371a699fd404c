"""Measured times of the kernels that could decode a layer: measured once, then read from disk."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from recalkv_vllm.cache_directory import cache_directory
from recalkv_vllm.ops.cuda.timing import Timer

logger = logging.getLogger("recalkv_vllm.ops")

#: Milliseconds of a call, by kernel.
Times = Mapping[str, float]
KERNELS = ("cuda", "triton")

_known: dict[str, Times] = {}


def decode_times(
    key: str, timer: Timer, calls: Callable[[], Mapping[str, Callable[[], object]]]
) -> Times:
    """Times of equal layers: this process's, those on disk, or new ones.

    Processes that measure at the same time do not wait for each other; the last one's file stays.

    Args:
        key: what they depend on (:func:`~.identity.identity`).
        calls: makes what is timed, by kernel; its memory is free again when this returns.
    """
    if key not in _known:
        times = _read(key)
        if times is None:
            times = {kernel: timer(call) for kernel, call in calls().items()}
            _write(key, times)
        _known[key] = times
    return _known[key]


def times_file(key: str) -> Path:
    """Where they lie, in ``RECALKV_CACHE``.

    Raises:
        RuntimeError: there is no home directory.
    """
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return cache_directory() / "decode-times" / f"{digest}.json"


def _read(key: str) -> Times | None:
    """None if there is no file, or one that is not what :func:`_write` writes for ``key``."""
    try:
        kept = json.loads(times_file(key).read_text())
        times = {kernel: float(kept["milliseconds"][kernel]) for kernel in KERNELS}
        ours = kept["key"] == key and all(0 < t < math.inf for t in times.values())
    except (OSError, ValueError, TypeError, KeyError, RuntimeError):
        return None
    return times if ours else None


def _write(key: str, times: Times) -> None:
    """Appears whole or not at all; a folder that cannot be written costs the next start a
    measurement."""
    try:
        path = times_file(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({"key": key, "milliseconds": times}))
        part.replace(path)
    except (OSError, RuntimeError) as error:
        logger.warning("recalkv: times of kernels are not kept in RECALKV_CACHE: %s", error)
