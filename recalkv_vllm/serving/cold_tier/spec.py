"""Offloading to host memory, and from there to files of entropy-coded latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    OffloadingMetricMetadata,
    OffloadingWorker,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from recalkv_vllm.serving.cold_tier.host_worker import HostWorker

_TIER = {"type": "ColdTier", "module_path": "recalkv_vllm.serving.cold_tier.tier"}


class ColdTierSpec(TieringOffloadingSpec):
    """vLLM's tiered offloading with the cold tier below host memory, for caches on CPUs too.

    Of ``kv_connector_extra_config``, it reads ``root_dir``, the folder of the files, besides what
    ``TieringOffloadingSpec`` reads.
    """

    @classmethod
    def build_metric_definitions(
        cls, extra_config: dict[str, Any]
    ) -> dict[str, OffloadingMetricMetadata]:
        return super().build_metric_definitions(_with_cold_tier(extra_config))

    def __init__(self, config: OffloadingConfig):
        super().__init__(replace(config, extra_config=_with_cold_tier(config.extra_config)))
        self._host_worker: HostWorker | None = None

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if not current_platform.is_cpu():
            return super().get_worker(kv_caches)
        if self._host_worker is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._host_worker = HostWorker(kv_caches, region, self.blocks_per_chunk)
        return self._host_worker


def _with_cold_tier(extra_config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the tier that ``root_dir`` stands for."""
    tier = {**_TIER, "root_dir": extra_config["root_dir"]}
    return {**extra_config, "secondary_tiers": [*extra_config.get("secondary_tiers", ()), tier]}
