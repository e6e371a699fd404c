"""Cache update, value up-projection and reconstruction of one layer in Triton."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from recalkv_vllm.kernels import heuristics
from recalkv_vllm.kernels.pieces import Bounds
from recalkv_vllm.key_scales import split_pages
from recalkv_vllm.ops.contract import BatchLimits, BoundLayer, LatentLayer, Pieces
from recalkv_vllm.ops.triton.cache_update import cache_update_launch
from recalkv_vllm.ops.triton.key_scales import KeyScales
from recalkv_vllm.ops.triton.launch import Launch
from recalkv_vllm.ops.triton.reconstruction import Reconstruction
from recalkv_vllm.ops.triton.value_up import Values, merged_value_up_launch, value_up_launch
from recalkv_vllm.ops.triton.work_list import Cut, Partial, WorkList


class CacheAndValues(BoundLayer):
    """What is Triton's whatever attends, which is left to the classes that inherit it.

    Args:
        constants: of the layer, as :func:`~.layout.kernel_constants` packs them.
    """

    def __init__(self, layer: LatentLayer, constants: dict[str, Any]):
        self._latent_format = layer.latent_format
        packed = (None if x is None else x.contiguous() for x in (layer.v_bias, layer.sinks))
        self.values = Values(layer.v_up.contiguous(), *packed)
        target = heuristics.target_of(layer.k_up.device)
        self._reconstruction = Reconstruction(layer, constants, target)
        self._key_scales = KeyScales(layer, constants, target) if layer.key_scales else None

    def update_cache(
        self, z: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        if not slot_mapping.shape[0]:
            return
        for launch in self._update_launches(z, kv_cache, slot_mapping):
            launch.run()

    def _update_launches(
        self, z: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> Iterator[Launch]:
        latents = self._latents(kv_cache)
        yield cache_update_launch(z, latents, slot_mapping, self._latent_format)
        if self._key_scales is not None:
            yield self._key_scales.launch(kv_cache, slot_mapping)

    def _latents(self, kv_cache: torch.Tensor) -> torch.Tensor:
        return split_pages(kv_cache, self._key_scales.count if self._key_scales else 0)[0]

    def value_up(self, o_lat: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        v_up = self.values.up
        out = o_lat.new_empty(*o_lat.shape[:2], v_up.shape[1], dtype=out_dtype or v_up.dtype)
        if o_lat.shape[0]:
            value_up_launch(o_lat, self.values, out).run()
        return out

    def reconstruct(
        self, kv_cache: torch.Tensor, pieces: Pieces, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        if pieces.num_tokens:
            self._reconstruction.launch(kv_cache, pieces, keys, values).run()

    def first_launches(
        self, kv_cache: torch.Tensor, limits: BatchLimits, *, merged: bool
    ) -> Iterator[Launch]:
        """Every launch that these can reach; they write to no slot of the cache.

        Args:
            merged: whether value latents come merged in float32, too, besides in the queries' dtype
                and in pieces.
        """
        v_up, width = self.values.up, self._latents(kv_cache).shape[2]
        rank = width if self._latent_format is None else self._latent_format.rank_of(width)
        nowhere = torch.full((1,), -1, dtype=torch.int64, device=v_up.device)
        yield from self._update_launches(v_up.new_zeros(1, rank), kv_cache, nowhere)
        num_kv_heads, head_dim, v_width = v_up.shape
        zeros = torch.zeros(2, dtype=torch.int32, device=v_up.device)
        nothing = Pieces(zeros[None, :1], zeros[:1], zeros, 0)
        keys = v_up.new_empty(0, num_kv_heads, head_dim)
        yield self._reconstruction.launch(kv_cache, nothing, keys, keys)
        per_kv = limits.num_heads // num_kv_heads
        uncut = WorkList(Cut(per_kv, per_kv, 1, 0, Bounds(1, 1)), zeros[None], zeros, zeros, 0)
        for tokens in heuristics.value_up_tokens(per_kv):
            rows = (tokens, limits.num_heads)
            o_lat = v_up.new_zeros(*rows, v_width, dtype=torch.float32)
            out = v_up.new_empty(*rows, head_dim)
            lse = o_lat.new_zeros(rows)
            yield value_up_launch(o_lat.to(v_up.dtype), self.values, out, lse)
            yield merged_value_up_launch(Partial(uncut, o_lat, lse), self.values, out)
            if merged:
                yield value_up_launch(o_lat, self.values, out, lse)
