"""Cache update and value up-projection of one layer in Triton."""

from __future__ import annotations

import torch

from recalkv_vllm.ops.contract import BoundLayer, LatentLayer
from recalkv_vllm.ops.triton.cache_update import cache_update_launch
from recalkv_vllm.ops.triton.value_up import value_up_launch


class CacheAndValues(BoundLayer):
    """Two of the ops of a layer; how it attends is left to the classes that inherit them."""

    def __init__(self, layer: LatentLayer):
        self._latent_format = layer.latent_format
        self._v_up = layer.v_up.contiguous()
        self._v_bias = None if layer.v_bias is None else layer.v_bias.contiguous()

    def update_cache(
        self, z: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        if slot_mapping.shape[0]:
            cache_update_launch(z, kv_cache, slot_mapping, self._latent_format).run()

    def value_up(self, o_lat: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        v_up = self._v_up
        out = o_lat.new_empty(*o_lat.shape[:2], v_up.shape[1], dtype=out_dtype or v_up.dtype)
        if o_lat.shape[0]:
            value_up_launch(o_lat, v_up, self._v_bias, out).run()
        return out
