"""From new latents in the cache to the launch that writes their keys' scales."""

from __future__ import annotations

from typing import Any

import torch
import triton

from recalkv_vllm.band_format import BandFormat
from recalkv_vllm.kernels import heuristics
from recalkv_vllm.kernels.columns import runs_of_span, streams_of
from recalkv_vllm.kernels.key_scales import write_key_scales
from recalkv_vllm.ops.contract import LatentLayer
from recalkv_vllm.ops.rotary import pair_order
from recalkv_vllm.ops.triton.launch import Launch
from recalkv_vllm.ops.triton.layout import cache_arguments, pack_heads
from recalkv_vllm.ops.triton.spills import SpillFree

#: Of what a layer fixes, that which the kernel takes; its factors are without the norm's weight.
CONSTANTS = (
    *("first_columns", "first_codes", "HEAD_DIM", "DIM", "K_WIDTH"),
    *("CODEC", "SCALE_SHIFT", "CODE_UNIT"),
)


class KeyScales:
    """Scales of one normed layer's keys.

    Args:
        constants: of the layer, as :func:`~.layout.kernel_constants` packs them.
        target: device to choose launch parameters for.
    """

    def __init__(self, layer: LatentLayer, constants: dict[str, Any], target: heuristics.Target):
        dim = constants["DIM"]
        columns = pair_order(layer.head_dim, layer.rot_dim, layer.is_neox)
        bands = layer.latent_format if isinstance(layer.latent_format, BandFormat) else None
        bias = layer.k_bias
        factors = layer.k_up.reshape(layer.num_kv_heads, layer.head_dim, layer.k_width)
        self.latent_format, self.count = layer.latent_format, layer.key_scales
        self.config = heuristics.reconstruction_config(
            dim, layer.k_up.element_size(), layer.k_width, bands is not None, target
        )
        self.constants = {name: constants[name] for name in CONSTANTS} | {
            "k_up": pack_heads(factors, columns, dim),
            "k_bias": None if bias is None else pack_heads(bias, columns, dim),
            "norm_eps": layer.k_norm_eps,
            "HEADS": layer.num_kv_heads // self.count,
            "TILE": self.config.tile,
        }
        self._k_runs = runs_of_span(layer.k_spans[0], bands)
        self._spill_free: SpillFree[heuristics.ReconstructionConfig] = SpillFree()

    def launch(self, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> Launch:
        """Of one slot or more, with their latents in the cache."""
        num_slots = slot_mapping.shape[0]
        arguments = {
            **self.constants,
            **cache_arguments(kv_cache, self.latent_format, self.count),
            "slot_mapping": slot_mapping,
            "num_slots": num_slots,
        }

        def launch(config: heuristics.ReconstructionConfig) -> Launch:
            grid = (triton.cdiv(num_slots, config.tile), self.count)
            streams = streams_of(self._k_runs, config.stream)
            own = arguments | {"K_STREAMS": streams, "STAGES": config.stages}
            return Launch(write_key_scales, grid, own, config.warps, config.stages)

        configs = heuristics.leaner_reconstruction(self.config)
        return self._spill_free.launch(kv_cache.shape[1], configs, launch)
