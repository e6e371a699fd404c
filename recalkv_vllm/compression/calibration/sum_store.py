"""Sums over calibration samples, on disk: bounded memory, and an interrupted run resumes.

A store is a directory with one memory-mapped ``.npy`` array per sum. Running sums are written in
``live/``; now and then ``live/`` is copied to ``snapshot-<samples done>/``, which appears by rename
and so is whole or absent. After an interruption the newest snapshot is where work goes on, which
adds the same numbers in the same order and so ends with the same bits. ``complete/`` is the end.
``scratch/`` is for what else the pass must put somewhere.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from recalkv_vllm.compression.errors import output_errors

log = logging.getLogger(__name__)

COMPLETE = "complete"
LIVE = "live"
SCRATCH = "scratch"
STATE = "state.json"


class SumStore:
    """Float32 sums by name. Use it as a context manager: one process at a time works on a store.

    Args:
        directory: where the store is, or will be.
        shapes: shape of each sum.
        snapshot_seconds: how often :meth:`sample_done` keeps a snapshot.
    """

    def __init__(
        self, directory: Path, shapes: Mapping[str, tuple[int, ...]], snapshot_seconds: float = 60
    ):
        self.directory = directory
        self.shapes = dict(shapes)
        self.snapshot_seconds = snapshot_seconds
        self.samples_done = 0
        self.sums: dict[str, torch.Tensor] = {}

    def __enter__(self) -> SumStore:
        with self._output_errors():
            self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.directory / "lock")
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            log.info("calibration statistics: waiting for another process that is making them")
            self._lock.acquire()
        if not is_complete(self.directory):
            try:
                with self._output_errors():
                    self._open()
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self.sums.clear()
        for name in (LIVE, SCRATCH):
            shutil.rmtree(self.directory / name, ignore_errors=True)
        self._lock.release()

    @property
    def scratch(self) -> Path:
        """A directory to make, that is removed when the store is closed."""
        return self.directory / SCRATCH

    def _open(self) -> None:
        live = self.directory / LIVE
        for path in (live, self.scratch):
            shutil.rmtree(path, ignore_errors=True)
        snapshots = self._snapshots()
        if snapshots:
            self.samples_done = max(snapshots)
            shutil.copytree(snapshots[self.samples_done], live)
        else:
            live.mkdir()
            for name, shape in self.shapes.items():
                np.lib.format.open_memmap(live / f"{name}.npy", "w+", np.float32, shape)
                allocate(live / f"{name}.npy")
        self.sums = {
            name: torch.from_numpy(np.load(live / f"{name}.npy", mmap_mode="r+"))
            for name in self.shapes
        }
        self._last_snapshot = time.monotonic()

    def _snapshots(self) -> dict[int, Path]:
        paths = self.directory.glob("snapshot-*")
        return {int(p.name.split("-")[1]): p for p in paths if (p / STATE).is_file()}

    def sample_done(self) -> None:
        """Note that one more sample is in all sums."""
        self.samples_done += 1
        if time.monotonic() - self._last_snapshot >= self.snapshot_seconds:
            with self._output_errors():
                self._snapshot()

    def _snapshot(self) -> None:
        older = self._snapshots().values()
        partial = self.directory / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(self.directory / LIVE, partial)
        self._write_state(partial, {"samples": self.samples_done})
        partial.rename(self.directory / f"snapshot-{self.samples_done}")
        for path in older:
            shutil.rmtree(path)
        self._last_snapshot = time.monotonic()

    def finish(self, tokens: int) -> None:
        """Declare the sums complete, over ``tokens`` tokens."""
        self.sums.clear()
        live = self.directory / LIVE
        with self._output_errors():
            self._write_state(live, {"samples": self.samples_done, "tokens": tokens})
            live.rename(self.directory / COMPLETE)
        for path in self._snapshots().values():
            shutil.rmtree(path)

    def _output_errors(self) -> AbstractContextManager[None]:
        return output_errors(f"calibration statistics {self.directory} (in RECALKV_CACHE)")

    @staticmethod
    def _write_state(directory: Path, state: dict[str, int]) -> None:
        (directory / STATE).write_text(json.dumps(state), encoding="utf-8")


def allocate(path: Path) -> None:
    """Give a sparse file its blocks. Raises :class:`OSError` if there are not so many.

    Without, a full disk shows in the first store to a mapped page, which ends the process.
    """
    if hasattr(os, "posix_fallocate"):  # macOS has none
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def is_complete(directory: Path) -> bool:
    """Whether a store holds finished sums."""
    return (directory / COMPLETE / STATE).is_file()


def read_complete(directory: Path) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Memory-mapped sums and the counts (``samples``, ``tokens``) of a finished store."""
    complete = directory / COMPLETE
    state = json.loads((complete / STATE).read_text(encoding="utf-8"))
    return {p.stem: np.load(p, mmap_mode="r") for p in complete.glob("*.npy")}, state
