"""Offloading that vLLM's ``OffloadingConnector`` can run on the CPU: its worker copies on the host.

vLLM 0.32 has a worker for GPUs alone. Which blocks go, what a page is and where it lies, and what a
request takes back is the connector's own in both; a worker only copies pages.
"""

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

#: For ``kv_connector_extra_config``; ``engine.py`` runs in this folder.
EXTRA_CONFIG = {
    "spec_name": "HostOffloadingSpec",
    "spec_module_path": "host_offloading",
    "cpu_bytes_to_use": 64 << 20,
}


class HostOffloadingSpec(CPUOffloadingSpec):
    def get_worker(self, kv_caches):
        return HostWorker(kv_caches, self.num_chunks)


class HostWorker(OffloadingWorker):
    """Copies at once; chunks are blocks."""

    def __init__(self, kv_caches, num_chunks):
        self.blocks = [one.tensor.view(torch.int8) for one in kv_caches.tensors]
        self.chunks = [blocks.new_zeros(num_chunks, blocks.shape[1]) for blocks in self.blocks]
        self.groups = kv_caches.group_data_refs
        self.finished = []

    def submit_store(self, job_id, src_spec, dst_spec):
        return self._copy(job_id, self.blocks, src_spec, self.chunks, dst_spec, src_spec)

    def submit_load(self, job_id, src_spec, dst_spec):
        return self._copy(job_id, self.chunks, src_spec, self.blocks, dst_spec, dst_spec)

    def _copy(self, job_id, sources, src_spec, targets, dst_spec, device_spec):
        copied = start = 0
        for refs, count in zip(self.groups, device_spec.group_sizes, strict=True):
            pairs = slice(start, start + count)
            start += count
            for ref in refs:
                source, target = sources[ref.tensor_idx], targets[ref.tensor_idx]
                size = ref.page_size_bytes
                for old, new in zip(
                    src_spec.block_ids[pairs], dst_spec.block_ids[pairs], strict=True
                ):
                    target[new, :size] = source[old, :size]
                    copied += size
        self.finished.append(TransferResult(job_id, True, copied, 1e-6))
        return True

    def get_finished(self):
        finished, self.finished = self.finished, []
        return finished

    def wait(self, job_ids):
        pass
