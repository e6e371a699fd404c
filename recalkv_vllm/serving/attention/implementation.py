"""Cache update and attention of one layer: between vLLM's opaque ops and our kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl

from recalkv_vllm.ops import BatchLimits, CheckedLayer, LatentLayer, bind
from recalkv_vllm.serving.attention.dense_prefill import DensePrefill
from recalkv_vllm.serving.attention.flash_attention import flash_attention
from recalkv_vllm.serving.attention.metadata import LatentMetadata
from recalkv_vllm.serving.attention.page_width import own_slots

#: Whether :meth:`LatentAttentionImpl.forward` writes latents into the cache too, which saves an
#: opaque op per layer. On a GPU the update is an op of its own, for graphs to hold it where they
#: leave attention out.
FORWARD_UPDATES_CACHE = current_platform.is_cpu()


def first_rows(x: torch.Tensor, count: int) -> torch.Tensor:
    """Batches are seldom padded, and a slice takes longer than the question."""
    return x if x.shape[0] == count else x[:count]


class LatentAttentionImpl(AttentionImpl[LatentMetadata]):
    """What vLLM's opaque attention ops call for one layer.

    Args:
        num_heads: query heads.
        head_size: of a query.
        scale: of logits.
        limits: of the batches that it will be called with.
        slot_width: of a token in the layer's cache.
    """

    def __init__(
        self, num_heads: int, head_size: int, scale: float, limits: BatchLimits, slot_width: int
    ):
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = 1
        self.kv_cache_dtype = "auto"
        self.bound = False
        self._dense: DensePrefill | None = None
        self._limits, self._slot_width = limits, slot_width
        self._paged: tuple[torch.Tensor, torch.Tensor] | None = None

    def bind(self, layer: LatentLayer, *, captured: bool = False) -> None:
        """Give the kernels this rank's constants, whenever weights were loaded.

        Args:
            captured: CUDA graphs may hold the constants of before.

        Raises:
            ValueError: they do, and would not see all that is new.
        """
        if self.bound:
            self._ops.rebind(layer, captured=captured)
            if self._dense is not None:
                self._dense.sinks = layer.sinks
            return
        self._v_width = layer.v_width
        self._ops: CheckedLayer = bind(layer)
        self._ops.reserve(self._limits)
        self._dense = self._dense_prefill(layer)
        self.bound = True

    def _dense_prefill(self, layer: LatentLayer) -> DensePrefill | None:
        flash = flash_attention(layer.k_up.dtype, layer.head_dim, layer.soft_cap is not None)
        if flash is None:
            return None
        capacity = 2 * self._limits.num_tokens
        return DensePrefill(self._ops, layer, flash, self.num_heads, capacity)

    def warm_up(self, kv_cache: torch.Tensor) -> int:
        """Compile and load all kernels of the layer for its cache; returns how many were run."""
        return self._ops.warm_up(self._slots(kv_cache), self._limits)

    def do_kv_cache_update(
        self,
        layer: nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write latents ``key: [tokens, rank]`` into the cache; ``value`` is the same tensor."""
        latents = first_rows(key, slot_mapping.shape[0])
        self._ops.update_cache(latents, self._slots(kv_cache), slot_mapping)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: LatentMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend rotated queries ``[tokens, h_q, d]`` to the cache; writes ``output`` alike.

        With :data:`FORWARD_UPDATES_CACHE`, caches latents ``key`` first.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("recalkv: fused output quantization is not supported")
        if attn_metadata is None:
            # Memory profiling: take what a real step takes, so that it is counted.
            o_lat = query.new_zeros(*query.shape[:2], self._v_width, dtype=torch.float32)
            output.copy_(self._ops.value_up(o_lat))
            if self._dense is not None:
                self._dense.profile(query)
            return output
        if FORWARD_UPDATES_CACHE:
            by_layer = get_forward_context().slot_mapping
            assert isinstance(by_layer, dict)  # a list is of micro-batches, which a CPU has not
            slots = by_layer.get(layer.layer_name)
            if slots is not None:
                self.do_kv_cache_update(layer, key, value, kv_cache, slots)
        tokens = attn_metadata.num_actual_tokens
        q, out = first_rows(query, tokens), first_rows(output, tokens)
        self._attend(q, self._slots(kv_cache), attn_metadata, out)
        return output

    def _slots(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """:func:`own_slots` of vLLM's tensor, which is the same in every step."""
        if self._paged is None or self._paged[0] is not kv_cache:
            self._paged = kv_cache, own_slots(kv_cache, self._slot_width)
        return self._paged[1]

    def _attend(
        self, q: torch.Tensor, paged: torch.Tensor, metadata: LatentMetadata, out: torch.Tensor
    ) -> None:
        """Head outputs of ``q`` into ``out``."""
        batch, prefills = metadata.batch, metadata.prefills
        slices = None
        if self._dense is not None and prefills is not None:
            slices = self._dense.slices(prefills)
        if self._dense is None or prefills is None or slices is None:
            self._ops.attend_heads(q, paged, batch, out=out)
            return
        decoded = batch.num_decode_tokens
        if decoded:
            decodes = batch.first(batch.num_decodes)
            self._ops.attend_heads(q[:decoded], paged, decodes, out=out[:decoded])
        self._dense.attend(q[decoded:], paged, prefills, slices, out[decoded:])
