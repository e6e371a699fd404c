"""The attention layer that owns a paged cache of latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention import attention as stock
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backend import AttentionType, max_decode_query_len
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

from recalkv_vllm.band_format import CacheFormat, slot_width
from recalkv_vllm.ops import BatchLimits
from recalkv_vllm.serving.attention.backend import RecalkvBackend, page_sizes
from recalkv_vllm.serving.attention.implementation import LatentAttentionImpl
from recalkv_vllm.serving.attention.warm_up import warm_up
from recalkv_vllm.serving.latent_dtype import model_dtype


class LatentAttention(nn.Module, AttentionLayerBase):
    """Paged attention over latents, in the manner of vLLM's MLA layer.

    It reuses vLLM's own opaque ops for cache update and attention, so that compilation, CUDA graph
    splitting and KV transfer treat it like any attention layer.
    """

    impl: LatentAttentionImpl
    process_weights_after_loading: Callable[[torch.dtype], None]

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scale: float,
        rank: int,
        sliding_window: int | None,
        latent_format: CacheFormat | None,
        key_scales: int,
        prefix: str,
    ):
        super().__init__()
        vllm_config = get_current_vllm_config()
        self.layer_name = prefix
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.rank = rank
        self.sliding_window = sliding_window
        self.latent_format = latent_format
        self.attn_type = AttentionType.DECODER
        self.attn_backend: type[RecalkvBackend] = RecalkvBackend
        self.dtype = model_dtype(vllm_config.model_config)
        self.slot_width = slot_width(latent_format, rank, self.dtype, key_scales)
        #: What vLLM is asked for, see ``slot_widths``.
        self.page_width = self.slot_width
        limits = BatchLimits(
            num_heads=num_heads,
            num_seqs=vllm_config.scheduler_config.max_num_seqs,
            decode_query_len=max_decode_query_len(vllm_config),
            seq_len=vllm_config.model_config.max_model_len,
            num_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        )
        self.impl = LatentAttentionImpl(num_heads, head_dim, scale, limits, self.slot_width)
        #: ``[num_blocks, 1, block_size, page_width]``, the layout that KV connectors expect.
        self.kv_cache = torch.tensor([])
        self._compilation_config = vllm_config.compilation_config
        self._layers = self._compilation_config.static_forward_context
        self._layers[prefix] = self

    def forward(self, query: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """Cache ``latent: [tokens, rank]`` and attend ``query: [tokens, h_q·d]``, rotated.

        Returns:
            ``[tokens, h_q·d]``.
        """
        output = torch.empty_like(query)
        heads = (-1, self.num_heads, self.head_dim)
        # What is not traced needs no opaque op, and torch takes its time to dispatch one.
        ops: Any = stock
        name: Any = self.layer_name
        if torch.compiler.is_compiling():
            ops, name = torch.ops.vllm, _encode_layer_name(name)
        written = None
        if not self.attn_backend.forward_includes_kv_cache_update:
            written = ops.unified_kv_cache_update(latent, latent, name)
        ops.unified_attention_with_output(
            query.view(heads),
            latent,
            latent,
            output.view(heads),
            name,
            kv_cache_dummy_dep=written,
        )
        return output

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take the allocated cache ``[num_blocks, 1, block_size, width]``.

        vLLM binds all layers' caches before it captures graphs, whatever its runner. The last one
        to get its cache warms up all: strides of caches are among what kernels are compiled for.
        """
        waited = self.kv_cache.numel() == 0
        super().bind_kv_cache(kv_cache)
        layers = [layer for layer in self._layers.values() if isinstance(layer, LatentAttention)]
        if waited and all(layer.kv_cache.numel() for layer in layers):
            warm_up(layers)

    @property
    def captured(self) -> bool:
        """Whether CUDA graphs hold attention, and with it what kernels were given."""
        return self._compilation_config.cudagraph_mode.has_full_cudagraphs()

    def get_attn_backend(self) -> type[RecalkvBackend]:
        return self.attn_backend

    @property
    def element_dtype(self) -> torch.dtype:
        """Of what a slot's width counts."""
        return self.dtype if self.latent_format is None else torch.uint8

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        sizes: dict[str, Any] = {
            "block_size": vllm_config.cache_config.block_size,
            **page_sizes(self.page_width, self.element_dtype),
        }
        if self.sliding_window is not None:
            # vLLM frees the blocks that a window has left behind.
            return SlidingWindowSpec(**sizes, sliding_window=self.sliding_window)
        return FullAttentionSpec(**sizes)
