"""From pieces of cached sequences to the launch that reconstructs their keys and values."""

from __future__ import annotations

from typing import Any

import torch

from recalkv_vllm.band_format import BandFormat
from recalkv_vllm.kernels import heuristics
from recalkv_vllm.kernels.columns import runs_of_span, streams_of
from recalkv_vllm.kernels.reconstruction import reconstruct_tokens
from recalkv_vllm.ops.contract import LatentLayer, Pieces
from recalkv_vllm.ops.triton.launch import Launch
from recalkv_vllm.ops.triton.layout import cache_arguments, pack_heads
from recalkv_vllm.ops.triton.spills import SpillFree

#: Of what a layer fixes, that which the kernel takes.
CONSTANTS = (
    *("k_up", "k_bias", "first_columns", "first_codes", "head_columns"),
    *("rope_table", "stride_rope", "HEAD_DIM", "DIM", "ROT_HALF", "K_WIDTH", "V_WIDTH"),
    *("KEY_SCALES", "CODEC", "SCALE_SHIFT", "CODE_UNIT"),
)


class Reconstruction:
    """Dense keys and values of one layer.

    Args:
        constants: of the layer, as :func:`~.layout.kernel_constants` packs them.
        target: device to choose launch parameters for.
    """

    def __init__(self, layer: LatentLayer, constants: dict[str, Any], target: heuristics.Target):
        dim, columns = constants["DIM"], torch.arange(layer.head_dim)
        self.latent_format = layer.latent_format
        self.num_kv_heads = layer.num_kv_heads
        bands = layer.latent_format if isinstance(layer.latent_format, BandFormat) else None
        self.config = heuristics.reconstruction_config(
            dim, layer.k_up.element_size(), layer.k_width, bands is not None, target
        )
        self.constants = {name: constants[name] for name in CONSTANTS} | {
            "v_up": pack_heads(layer.v_up, columns, dim),
            "v_bias": None if layer.v_bias is None else pack_heads(layer.v_bias, columns, dim),
            "NUM_KV_HEADS": layer.num_kv_heads,
            "TILE": self.config.tile,
        }
        self._k_runs = runs_of_span(layer.k_spans[0], bands)
        self._v_runs = runs_of_span(layer.v_spans[0], bands)
        self._spill_free: SpillFree[heuristics.ReconstructionConfig] = SpillFree()

    def launch(
        self, kv_cache: torch.Tensor, pieces: Pieces, keys: torch.Tensor, values: torch.Tensor
    ) -> Launch:
        """See :meth:`BoundLayer.reconstruct`."""
        num_pieces = pieces.positions.shape[0]
        arguments = {
            **self.constants,
            **cache_arguments(kv_cache, self.latent_format, self.constants["KEY_SCALES"]),
            "block_table": pieces.block_table,
            "positions": pieces.positions,
            "start_loc": pieces.start_loc,
            "keys": keys,
            "values": values,
            "num_pieces": num_pieces,
            "stride_table": pieces.block_table.stride(0),
        }

        def launch(config: heuristics.ReconstructionConfig) -> Launch:
            tiles = pieces.num_tokens // config.tile + num_pieces
            own = arguments | {
                "K_STREAMS": streams_of(self._k_runs, config.stream),
                "V_STREAMS": streams_of(self._v_runs, config.stream),
                "STAGES": config.stages,
            }
            grid = (tiles * self.num_kv_heads,)
            return Launch(reconstruct_tokens, grid, own, config.warps, config.stages)

        configs = heuristics.leaner_reconstruction(self.config)
        return self._spill_free.launch(kv_cache.shape[1], configs, launch)
