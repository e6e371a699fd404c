"""One layer's ops in Triton."""

from __future__ import annotations

from itertools import chain

import torch

from recalkv_vllm.ops.contract import Batch, BatchLimits, LatentLayer
from recalkv_vllm.ops.triton.attention import TritonAttention
from recalkv_vllm.ops.triton.cache_and_values import CacheAndValues
from recalkv_vllm.ops.triton.warm_up import head_launches, run_all


class TritonLayer(CacheAndValues):
    """A layer's constants packed; see :class:`BoundLayer`."""

    def __init__(self, layer: LatentLayer):
        self.attention = TritonAttention(layer)
        super().__init__(layer, self.attention.constants)

    def attend(
        self, q: torch.Tensor, kv_cache: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.attention.attend(q, kv_cache, batch)

    def attend_heads(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: Batch,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        heads = torch.empty_like(q) if out is None else out
        self.attention.attend_heads(q, kv_cache, batch, self.values, heads)
        return heads

    def prefers_dense(self, num_heads: int, queries: float) -> bool:
        return self.attention.prefers_dense(num_heads, queries)

    def reserve(self, limits: BatchLimits) -> None:
        self.attention.reserve(limits)

    def warm_up(self, kv_cache: torch.Tensor, limits: BatchLimits) -> int:
        attention = head_launches(self.attention, kv_cache, limits, self.values, decodes=True)
        return run_all(chain(attention, self.first_launches(kv_cache, limits, merged=False)))
