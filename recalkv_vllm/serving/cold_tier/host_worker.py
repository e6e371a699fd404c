"""Copies between a cache on the CPU and the region that offloaded chunks are in."""

from __future__ import annotations

import time

import torch
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion


class HostWorker(OffloadingWorker):
    """Copies pages at once; vLLM 0.32 has a worker for GPUs alone.

    Args:
        kv_caches: pages of the cache.
        region: where chunks are; released by :meth:`shutdown`.
        blocks_per_chunk: blocks of the cache in a chunk.
    """

    def __init__(
        self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion, blocks_per_chunk: int
    ):
        self._region, self._blocks_per_chunk = region, blocks_per_chunk
        self._pages = [one.tensor.view(torch.int8) for one in kv_caches.tensors]
        self._chunks = [
            region.create_next_worker_view(pages.shape[1] * blocks_per_chunk)
            for pages in self._pages
        ]
        self._groups = kv_caches.group_data_refs
        self._finished: list[TransferResult] = []

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        return self._copy(job_id, src_spec, dst_spec, store=True)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        return self._copy(job_id, dst_spec, src_spec, store=False)

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is ever under way."""

    def shutdown(self) -> None:
        self._pages.clear()
        self._chunks.clear()
        self._region.cleanup()

    def _copy(
        self, job_id: int, blocks: GPULoadStoreSpec, chunks: LoadStoreSpec, *, store: bool
    ) -> bool:
        assert isinstance(chunks, BlockIDsLoadStoreSpec)
        start = time.perf_counter()
        copied = first_block = first_chunk = 0
        groups = zip(self._groups, blocks.group_sizes, blocks.block_indices, strict=True)
        for refs, count, index in groups:
            skipped = index % self._blocks_per_chunk if count else 0
            for i in range(count):
                chunk, part = divmod(skipped + i, self._blocks_per_chunk)
                block = int(blocks.block_ids[first_block + i])
                row = int(chunks.block_ids[first_chunk + chunk])
                for ref in refs:
                    page = self._pages[ref.tensor_idx][block]
                    start_byte = part * len(page)
                    place = self._chunks[ref.tensor_idx][row, start_byte : start_byte + len(page)]
                    source, target = (page, place) if store else (place, page)
                    target[: ref.page_size_bytes] = source[: ref.page_size_bytes]
                    copied += ref.page_size_bytes
            first_block += count
            first_chunk += -(-(skipped + count) // self._blocks_per_chunk)
        seconds = time.perf_counter() - start
        self._finished.append(TransferResult(job_id, True, copied, seconds))
        return True
