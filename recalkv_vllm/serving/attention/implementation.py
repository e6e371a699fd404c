"""Cache update and attention of one layer: between vLLM's opaque ops and our kernels."""

from __future__ import annotations

import torch
from torch import nn
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer

from recalkv_vllm.ops import (
    LatentLayer,
    bind_paged_latent_attention,
    latent_cache_update,
    latent_value_up,
)
from recalkv_vllm.serving.attention.metadata import LatentMetadata


class LatentAttentionImpl(AttentionImpl[LatentMetadata]):
    """What vLLM's opaque attention ops call for one layer.

    Args:
        num_heads: query heads.
        head_size: of a query.
        scale: of logits.
        largest_batch: sequences, queries of each decode, and tokens of a sequence.
    """

    def __init__(
        self, num_heads: int, head_size: int, scale: float, largest_batch: tuple[int, int, int]
    ):
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = 1
        self.kv_cache_dtype = "auto"
        self.bound = False
        self._largest_batch = largest_batch

    def bind(self, layer: LatentLayer, v_up: torch.Tensor, v_bias: torch.Tensor | None) -> None:
        """Give the kernels this rank's constants, whenever weights were loaded.

        Args:
            layer: constants of attention.
            v_up: ``[h_kv, d, v_width]``.
            v_bias: ``[h_kv, d]``.
        """
        self._latent_format, self._v_width = layer.latent_format, layer.v_width
        self._attend = bind_paged_latent_attention(layer)
        self._attend.reserve(self.num_heads, *self._largest_batch)
        self._v_up, self._v_bias = v_up, v_bias
        self.bound = True

    def value_up(self, o_lat: torch.Tensor) -> torch.Tensor:
        """Head outputs ``[tokens, h_q, d]`` of value latents ``[tokens, h_q, v_width]``."""
        return latent_value_up(o_lat, self._v_up, self._v_bias)

    def do_kv_cache_update(
        self,
        layer: nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write latents ``key: [tokens, rank]`` into the cache; ``value`` is the same tensor."""
        latents, paged = key[: slot_mapping.shape[0]], kv_cache.squeeze(1)
        latent_cache_update(latents, paged, slot_mapping, self._latent_format)

    def forward(
        self,
        layer: AttentionLayer,
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
            raise NotImplementedError("recalkv: fused output quantization is not supported")
        if attn_metadata is None:
            # Memory profiling: take what a real step takes, so that it is counted.
            o_lat = query.new_zeros(*query.shape[:2], self._v_width, dtype=torch.float32)
            output.copy_(self.value_up(o_lat))
            return output
        tokens = attn_metadata.num_actual_tokens
        o_lat, _ = self._attend(
            query[:tokens],
            kv_cache.squeeze(1),
            attn_metadata.block_table,
            attn_metadata.seq_lens,
            attn_metadata.query_start_loc,
            attn_metadata.hints,
        )
        output[:tokens].copy_(self.value_up(o_lat))
        return output
