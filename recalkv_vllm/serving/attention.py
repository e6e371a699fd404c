"""The attention layer that owns a paged cache of latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backend import AttentionImpl, AttentionType, max_decode_query_len
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

from recalkv_vllm import ops
from recalkv_vllm.latent_format import LatentFormat
from recalkv_vllm.serving.backend import LatentMetadata, RecalkvBackend
from recalkv_vllm.serving.sharding import LatentShard


class LatentAttentionImpl(AttentionImpl[LatentMetadata]):
    """What vLLM's opaque attention ops call for one layer."""

    def __init__(self, num_heads: int, head_size: int, scale: float):
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = 1
        self.kv_cache_dtype = "auto"

    def do_kv_cache_update(
        self,
        layer: LatentAttention,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write latents ``key: [tokens, rank]`` into the cache; ``value`` is the same tensor."""
        latents, paged = key[: slot_mapping.shape[0]], kv_cache.squeeze(1)
        ops.latent_cache_update(latents, paged, slot_mapping, layer.latent_format)

    def forward(
        self,
        layer: LatentAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: LatentMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend rotated queries ``[tokens, h_q, d]`` to the cache; writes ``output`` alike."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("recalkv: fused output quantisation is not supported")
        if attn_metadata is None:
            # Memory profiling: take what a real step takes, so that it is counted.
            o_lat = query.new_zeros(*query.shape[:2], layer.v_width, dtype=torch.float32)
            output.copy_(layer.value_up(o_lat))
            return output
        tokens = attn_metadata.num_actual_tokens
        o_lat, _ = layer.attend(
            query[:tokens],
            kv_cache.squeeze(1),
            attn_metadata.block_table,
            attn_metadata.seq_lens,
            attn_metadata.query_start_loc,
            attn_metadata.hints,
        )
        output[:tokens].copy_(layer.value_up(o_lat))
        return output


class LatentAttention(nn.Module, AttentionLayerBase):
    """Paged attention over latents, in the manner of vLLM's MLA layer.

    It reuses vLLM's own opaque ops for cache update and attention, so that compilation, CUDA graph
    splitting and KV transfer treat it like any attention layer.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scale: float,
        shard: LatentShard,
        sliding_window: int | None,
        prefix: str,
        soft_cap: float | None = None,
        latent_format: LatentFormat | None = None,
    ):
        super().__init__()
        vllm_config = get_current_vllm_config()
        self.layer_name = prefix
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scale = scale
        self.shard = shard
        self.v_width = shard.v_spans[0].width
        self.sliding_window = sliding_window
        self.soft_cap = soft_cap
        self.latent_format = latent_format
        self._largest_batch = (
            vllm_config.scheduler_config.max_num_seqs,
            max_decode_query_len(vllm_config),
            vllm_config.model_config.max_model_len,
        )
        self.attn_type = AttentionType.DECODER
        self.attn_backend = RecalkvBackend
        self.dtype = vllm_config.model_config.dtype
        self.impl = LatentAttentionImpl(num_heads, head_dim, scale)
        self.bound = False
        #: ``[num_blocks, 1, block_size, width]``, vLLM's standard form, which KV connectors expect.
        self.kv_cache = torch.tensor([])
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def bind(
        self,
        k_up: torch.Tensor,
        v_up: torch.Tensor,
        *,
        k_bias: torch.Tensor | None,
        v_bias: torch.Tensor | None,
        cos_sin_cache: torch.Tensor,
        is_neox: bool,
        k_norm_weight: torch.Tensor | None = None,
        k_norm_eps: float = 1e-6,
    ) -> None:
        """Give the kernels this rank's factors, once weights are loaded.

        Args:
            k_up: ``[G_k, s·d, k_width]``.
            v_up: ``[h_kv, d, v_width]``.
            k_bias: ``[h_kv, d]``.
            v_bias: ``[h_kv, d]``.
            cos_sin_cache: ``[max_position, rot_dim]``.
            is_neox: RoPE pairing.
            k_norm_weight: ``[d]``.
            k_norm_eps: its epsilon.
        """
        layer = ops.LatentLayer(
            k_up=k_up,
            k_spans=self.shard.k_spans,
            v_spans=self.shard.v_spans,
            head_dim=self.head_dim,
            scale=self.scale,
            cos_sin_cache=cos_sin_cache,
            is_neox=is_neox,
            k_bias=k_bias,
            k_norm_weight=k_norm_weight,
            k_norm_eps=k_norm_eps,
            sliding_window=self.sliding_window,
            soft_cap=self.soft_cap,
            latent_format=self.latent_format,
        )
        self.attend = ops.bind_paged_latent_attention(layer)
        self.attend.reserve(self.num_heads, *self._largest_batch)
        self._v_up, self._v_bias = v_up, v_bias
        self.bound = True

    def value_up(self, o_lat: torch.Tensor) -> torch.Tensor:
        """Head outputs ``[tokens, h_q, d]`` of value latents ``[tokens, h_q, v_width]``."""
        return ops.latent_value_up(o_lat, self._v_up, self._v_bias)

    def forward(self, query: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """Cache ``latent: [tokens, rank]`` and attend ``query: [tokens, h_q·d]``, rotated.

        Returns:
            ``[tokens, h_q·d]``.
        """
        output = torch.empty_like(query)
        heads = (-1, self.num_heads, self.head_dim)
        name = _encode_layer_name(self.layer_name)
        written = torch.ops.vllm.unified_kv_cache_update(latent, latent, name)
        torch.ops.vllm.unified_attention_with_output(
            query.view(heads),
            latent,
            latent,
            output.view(heads),
            name,
            kv_cache_dummy_dep=written,
        )
        return output

    def get_attn_backend(self) -> type[RecalkvBackend]:
        return self.attn_backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        # vLLM counts head_size + head_size_v numbers per head; ours is one head of `rank` numbers,
        # or of the bytes of its codes and scales.
        width, dtype = self.shard.rank, self.dtype
        if self.latent_format is not None:
            width, dtype = self.latent_format.slot_bytes(width), torch.uint8
        half = width // 2
        sizes: dict[str, Any] = {
            "block_size": vllm_config.cache_config.block_size,
            "num_kv_heads": 1,
            "head_size": width - half,
            "head_size_v": half,
            "dtype": dtype,
            "max_tp_shards": 1,
        }
        if self.sliding_window is not None:
            # vLLM frees the blocks that a window has left behind.
            return SlidingWindowSpec(**sizes, sliding_window=self.sliding_window)
        return FullAttentionSpec(**sizes)
