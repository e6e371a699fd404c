"""One layer's ops in C++: from the contract's arguments to calls of ``torch.ops.recalkv_cpu``."""

from __future__ import annotations

from dataclasses import replace

import torch

from recalkv_vllm.key_scales import split_pages
from recalkv_vllm.ops.contract import Batch, BatchLimits, BoundLayer, LatentLayer
from recalkv_vllm.ops.cpu.layout import factors_dtype, pack_format, pack_layer
from recalkv_vllm.ops.cpu.plan import instruction_set
from recalkv_vllm.ops.key_norm import update_key_scales
from recalkv_vllm.ops.workspace import clear_rows


class CpuLayer(BoundLayer):
    """A layer's constants packed; see :class:`BoundLayer`."""

    def __init__(self, layer: LatentLayer):
        self._isa = instruction_set(layer.k_up.dtype)
        packed = pack_layer(layer, self._isa)
        self._attend, self._attend_heads = packed.attend, packed.attend_heads
        self._v_up = layer.v_up.contiguous()
        self._v_bias = None if layer.v_bias is None else layer.v_bias.float().contiguous()
        self._update = torch.ops.recalkv_cpu.latent_cache_update.default
        self._format = pack_format(layer.latent_format)
        self._normed: LatentLayer | None = None
        if layer.key_scales:
            # In the type of the attention's own factors, which is fast here.
            self._normed = replace(layer, k_up=layer.k_up.to(factors_dtype(self._isa)))

    def update_cache(
        self, z: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        normed = self._normed
        if normed is None:
            self._update(z, kv_cache, slot_mapping, *self._format)
            return
        latents, _ = split_pages(kv_cache, normed.key_scales)
        self._update(z, latents, slot_mapping, *self._format)
        update_key_scales(normed, kv_cache, slot_mapping, normed.k_up.dtype)

    def attend(
        self, q: torch.Tensor, kv_cache: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        starts = batch.query_start_loc
        o_lat, lse = self._attend(q, kv_cache, batch.block_table, batch.seq_lens, starts)
        clear_rows(o_lat, lse, range(int(starts[-1]), len(o_lat)))
        return o_lat, lse

    def attend_heads(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: Batch,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        heads = out
        if heads is None or not heads.is_contiguous():
            heads = q.new_empty(q.shape)
        starts = batch.query_start_loc
        self._attend_heads(q, kv_cache, batch.block_table, batch.seq_lens, starts, heads)
        return heads if out is None or out is heads else out.copy_(heads)

    def value_up(self, o_lat: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.ops.recalkv_cpu.latent_value_up.default(
            o_lat.float().contiguous(),
            self._v_up,
            self._v_bias,
            out_dtype or self._v_up.dtype,
            self._isa,
        )

    def reserve(self, limits: BatchLimits) -> None:
        """Nothing to reserve: threads keep their scratch memory."""
