"""A decoder layer's self-attention with low-rank keys and values, in place of vLLM's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear

from recalkv_vllm.architectures import language_config
from recalkv_vllm.band_format import stored_format
from recalkv_vllm.checkpoint import AttentionGeometry, CheckpointError, LatentLayout
from recalkv_vllm.latent_format import LatentFormat
from recalkv_vllm.ops import LatentLayer
from recalkv_vllm.serving.attention.layer import LatentAttention
from recalkv_vllm.serving.attention.rotary import position_table, rotate_queries
from recalkv_vllm.serving.model.factor_layers import LatentDown, PerHead
from recalkv_vllm.serving.model.joint_projection import JointProjection, can_be_joined
from recalkv_vllm.serving.model.stock_attention import StockParts
from recalkv_vllm.serving.model.stock_layer import check_stock_layer
from recalkv_vllm.serving.sharding import shard_latent


class LatentSelfAttention(nn.Module):
    """Replaces a stock self-attention module: same call, same output projection and RoPE.

    Queries come from ``q_proj`` as ever; keys and values come from one latent ``down · x``, cached
    before RoPE. It takes the stock module's parts and drops its fused ``qkv_proj``.

    Args:
        stock: the module that it replaces.
        parts: what that module's forward uses.
        uniform_format: how all layers' latents are stored, of a layout without bands.
    """

    def __init__(
        self,
        stock: Any,
        parts: StockParts,
        layout: LatentLayout,
        geometry: AttentionGeometry,
        vllm_config: VllmConfig,
        uniform_format: LatentFormat | None,
    ):
        super().__init__()
        name = stock.attn.layer_name
        prefix = name.removesuffix(".attn")
        shard = shard_latent(
            layout,
            geometry,
            get_tensor_model_parallel_rank(),
            get_tensor_model_parallel_world_size(),
        )
        head_dim, hidden_size = geometry.head_dim, geometry.hidden_size
        qkv_bias = stock.qkv_proj.bias is not None
        self.shard = shard
        self.head_dim = head_dim
        # Some models have layers without RoPE.
        self.rotary_emb = parts.rotary_emb
        self.o_proj = stock.o_proj
        self.q_proj = ColumnParallelLinear(
            hidden_size,
            geometry.num_heads * head_dim * (1 + parts.gated),
            bias=qkv_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.q_proj",
        )
        self.down = LatentDown(hidden_size, shard.columns, f"{prefix}.down")
        # Adapters take the place of `q_proj`.
        joined = vllm_config.lora_config is None and can_be_joined([self.q_proj, self.down])
        self.joint = JointProjection([self.q_proj, self.down]) if joined else None
        heads, num_heads = shard.kv_heads, geometry.num_kv_heads
        self.k_up = PerHead(heads, num_heads, head_dim, layout.k_width)
        self.v_up = PerHead(heads, num_heads, head_dim, layout.v_width)
        self.k_bias = PerHead(heads, num_heads, head_dim) if qkv_bias else None
        self.v_bias = PerHead(heads, num_heads, head_dim) if qkv_bias else None
        # Norms, where the model has them: queries' runs here, keys' in attention.
        self.q_norm, self.k_norm = parts.q_norm, parts.k_norm
        self.gated = parts.gated
        self.norms_all_heads = parts.key_norm == "token"
        if parts.key_norm != geometry.key_norm:
            raise CheckpointError(
                f"recalkv: {name}: expected key norms over a {geometry.key_norm}, found over a "
                f"{parts.key_norm}, which latents are not served with"
            )
        # Of this rank's query heads, loaded as in vLLM.
        self.sinks = parts.sinks
        del vllm_config.compilation_config.static_forward_context[name]
        # Where its class has another name for it, what its attention layer was given.
        self.scale = getattr(stock, "scaling", stock.attn.impl.scale)
        hf_config = language_config(vllm_config.model_config.hf_config.to_dict())
        self.soft_cap = hf_config.get("attn_logit_softcapping")
        check_stock_layer(stock.attn, self.scale, self.soft_cap, self.sinks)
        self.attn = LatentAttention(
            stock.attn.num_heads,
            head_dim,
            self.scale,
            shard.rank,
            stock.attn.sliding_window,
            stored_format(shard.bands, uniform_format),
            shard.key_scales,
            prefix=name,
        )
        self.attn.process_weights_after_loading = self.bind_factors

    def bind_factors(self, act_dtype: torch.dtype) -> None:
        """Hand factors and biases to the kernels; vLLM calls it whenever weights were loaded."""
        if self.joint is not None:
            self.joint.pack()
        cos_sin_cache, is_neox = position_table(self.rotary_emb)
        k_groups = len(self.shard.k_spans)
        layer = LatentLayer(
            k_up=self.k_up.weight.data.unflatten(0, (k_groups, -1)).flatten(1, 2),
            v_up=self.v_up.weight.data,
            k_spans=self.shard.k_spans,
            v_spans=self.shard.v_spans,
            head_dim=self.head_dim,
            scale=self.scale,
            cos_sin_cache=cos_sin_cache,
            is_neox=is_neox,
            k_bias=None if self.k_bias is None else self.k_bias.weight.data,
            v_bias=None if self.v_bias is None else self.v_bias.weight.data,
            sliding_window=self.attn.sliding_window,
            soft_cap=self.soft_cap,
            sinks=None if self.sinks is None else self.sinks.data,
            latent_format=self.attn.latent_format,
            **self._key_norm(),
        )
        try:
            self.attn.impl.bind(layer, captured=self.attn.captured)
        except ValueError as error:
            if not self.attn.captured:
                raise
            raise CheckpointError(
                f"recalkv: {self.attn.layer_name}: CUDA graphs would not see the new weights "
                f"({error}); start the engine with "
                """--compilation-config '{"cudagraph_mode": "PIECEWISE"}'"""
            ) from error

    def _key_norm(self) -> dict[str, Any]:
        if self.k_norm is None:
            return {}
        weight: Any = self.k_norm.weight.data
        # Gemma's norms scale by one plus their weight, added in float32.
        if isinstance(self.k_norm, GemmaRMSNorm):
            weight = weight.float() + 1
        if self.norms_all_heads:
            weight = weight.unflatten(0, (-1, self.head_dim))
        return {"k_norm_weight": weight, "k_norm_eps": self.k_norm.variance_epsilon}

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.joint is not None:
            q, latent = self.joint(hidden_states)
        else:
            q, _ = self.q_proj(hidden_states)
            latent, _ = self.down(hidden_states)
        gate = None
        if self.gated:
            q, gate = q.unflatten(-1, (-1, 2, self.head_dim)).unbind(-2)
            q, gate = q.flatten(-2), gate.flatten(-2)
        if self.q_norm is not None:
            of_one = q if self.norms_all_heads else q.unflatten(-1, (-1, self.head_dim))
            q = self.q_norm(of_one).view(q.shape)
        if self.rotary_emb is not None:
            q = rotate_queries(self.rotary_emb, positions, q, self.head_dim)
        attended = self.attn(q, latent)
        if gate is not None:
            attended = attended * torch.sigmoid(gate)
        output = self.o_proj(attended)
        # vLLM's projections return a bias beside it, unless asked not to.
        return output if isinstance(output, torch.Tensor) else output[0]


class HiddenStatesFirst(LatentSelfAttention):
    """:class:`LatentSelfAttention` called with its arguments in the other order."""

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        return super().forward(positions, hidden_states)
