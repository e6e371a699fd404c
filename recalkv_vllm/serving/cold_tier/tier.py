"""The cold tier of vLLM's tiered offloading: its file-system tier, with latents entropy-coded."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.base import (
    OffloadingCounterMetadata,
    OffloadingMetricMetadata,
    OffloadingSpec,
)
from vllm.v1.kv_offload.tiering.base import TransferJob
from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager

from recalkv_vllm.serving.cold_tier.served_layout import served_factors, served_layout
from recalkv_vllm.serving.cold_tier.store import ColdStore

logger = logging.getLogger(__name__)

LATENT_BYTES = "recalkv:cold_tier_latent_bytes"
FILE_BYTES = "recalkv:cold_tier_file_bytes"
LOAD_SECONDS = "recalkv:cold_tier_load_seconds"
DAMAGED_CHUNKS = "recalkv:cold_tier_damaged_chunks"
_COUNTERS = {
    LATENT_BYTES: "Bytes of latents that the cold tier has stored.",
    FILE_BYTES: "Bytes of the files that it has stored them in.",
    LOAD_SECONDS: "Time spent reading and decoding files, in seconds.",
    DAMAGED_CHUNKS: "Files that could not be read, whose latents were computed again.",
}


class ColdTier(FileSystemTierManager):
    """Files of entropy-coded chunks. Lookups, threads and names of files are vLLM's.

    Args:
        offloading_spec: that makes the tier.
        primary_kv_view: ``[chunks, bytes]``, host memory.
        tier_type: its name in metrics.
        root_dir: the folder, which several engines may share.
        n_read_threads: that read and decode.
        n_write_threads: that encode and write.
        kwargs: others of vLLM's tier.
    """

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        root_dir: str,
        n_read_threads: int = 2,
        n_write_threads: int = 1,
        **kwargs: Any,
    ):
        # Another tier's files of the same latents are no files of ours.
        root = Path(root_dir) / "recalkv"
        super().__init__(
            *(offloading_spec, primary_kv_view, tier_type, str(root)),
            *(n_read_threads, n_write_threads),
            **kwargs,
        )
        self._rows = np.asarray(self._primary_kv_view).view(np.uint8)
        layout = served_layout(offloading_spec, self._block_size)
        if layout is None:
            logger.warning(
                "Cold tier: latents are compressed without prediction, which is for latents in "
                "bands of models whose layers are all in one cache group"
            )
        folder, factors = Path(self.file_mapper.base_path), served_factors(offloading_spec)
        self.store = ColdStore(folder, layout, self._block_size, factors)
        self._counts = dict.fromkeys(_COUNTERS, 0.0)
        self._counts_lock = threading.Lock()

    def submit_store(self, job_metadata: TransferJob) -> None:
        keys, rows = list(job_metadata.keys), [*map(int, job_metadata.chunk_ids)]
        paths = self._paths(keys)
        if self.events is not None:
            self._store_job_keys[job_metadata.job_id] = keys
        self._job_block_counts[job_metadata.job_id] = len(keys)
        self._pool.enqueue_store(job_metadata.job_id, 1, [partial(self._store, paths, rows)])

    def submit_load(self, job_metadata: TransferJob) -> None:
        job_id, keys = job_metadata.job_id, list(job_metadata.keys)
        rows = [*map(int, job_metadata.chunk_ids)]
        self._load_job_keys[job_id] = keys
        self._job_block_counts[job_id] = len(keys)
        load = partial(self._load, job_id, self._paths(keys), rows)
        self._pool.enqueue_load(job_id, 1, [load])

    def get_stats(self) -> OffloadingConnectorStats | None:
        """What was counted since the last call; None if nothing."""
        with self._counts_lock:
            counts, self._counts = self._counts, dict.fromkeys(_COUNTERS, 0.0)
        stats = OffloadingConnectorStats()
        for name, count in counts.items():
            if count:
                stats.increase_counter(name, count)
        return stats if any(counts.values()) else None

    @classmethod
    def build_metric_definitions(
        cls, extra_config: dict[str, Any]
    ) -> dict[str, OffloadingMetricMetadata]:
        return {name: OffloadingCounterMetadata(documentation=of) for name, of in _COUNTERS.items()}

    def _paths(self, keys: Iterable[Any]) -> list[Path]:
        return [Path(self.file_mapper.get_file_name(key)) for key in keys]

    def _store(self, paths: list[Path], rows: list[int]) -> None:
        new = [i for i, path in enumerate(paths) if not path.exists()]
        if not new:
            return
        chunks = self._rows[[rows[i] for i in new]]
        written = self.store.store([paths[i] for i in new], chunks)
        self._count({LATENT_BYTES: chunks.size, FILE_BYTES: written})

    def _load(self, job_id: int, paths: list[Path], rows: list[int]) -> None:
        start = time.monotonic()
        chunks, wrong = self.store.load(paths)
        self._rows[rows[: len(chunks)]] = chunks
        self._count({LOAD_SECONDS: time.monotonic() - start})
        if wrong is None:
            return
        # The rest of the job is a miss; the next store writes the file anew.
        paths[len(chunks)].unlink(missing_ok=True)
        self._load_progress[job_id] = len(chunks)
        self._count({DAMAGED_CHUNKS: 1})
        raise OSError(f"recalkv: cold tier: {wrong}; computed again")

    def _count(self, counts: dict[str, float]) -> None:
        with self._counts_lock:
            for name, count in counts.items():
                self._counts[name] += count
