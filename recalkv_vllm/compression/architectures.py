"""Which models can be compressed, and where their attention projections are.

All supported families share the module names of Llama (``model.layers[i].self_attn.k_proj``) and
feed the key and value projections the same input, so one table of names is all that differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from recalkv_vllm.compression.errors import InputError

#: ``model_type`` of the base config to the architecture name of the compressed checkpoint.
ARCHITECTURES = {
    "gemma2": "RecalkvGemma2ForCausalLM",
    "gemma3_text": "RecalkvGemma3ForCausalLM",
    "granite": "RecalkvGraniteForCausalLM",
    "llama": "RecalkvLlamaForCausalLM",
    "mistral": "RecalkvMistralForCausalLM",
    "mixtral": "RecalkvMixtralForCausalLM",
    "phi3": "RecalkvPhi3ForCausalLM",
    "qwen2": "RecalkvQwen2ForCausalLM",
    "qwen3": "RecalkvQwen3ForCausalLM",
    "qwen3_moe": "RecalkvQwen3MoeForCausalLM",
}
#: Fields of a config that change attention in a way that latents are not served with.
UNSUPPORTED_FIELDS = ("dual_chunk_attention_config", "llama_4_scaling")


def compressed_architecture(config: Mapping[str, Any]) -> str:
    """Architecture name of the compressed form of a Hugging Face config.

    Raises:
        InputError: the model is not supported, or compressed already.
    """
    if "recalkv" in config:
        raise InputError("the model is already compressed by recalkv; expected its base model")
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise InputError(
            f"model_type {model_type!r} is not supported; expected one of "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    for field in UNSUPPORTED_FIELDS:
        if config.get(field) is not None:
            raise InputError(f"{model_type} with {field} is not supported")
    if not config.get("is_causal", True):
        raise InputError("is_causal false: expected a decoder, found bidirectional attention")
    return ARCHITECTURES[model_type]


#: A transformers model; what is inside has no static types there.
CausalLM = Any


class Attention(Protocol):
    """A decoder layer's attention module, as far as it is touched here."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    head_dim: int
    qkv_proj: nn.Module  # only where the three are fused


def attention_modules(model: CausalLM) -> list[Attention]:
    """The attention module of every decoder layer, first layer first."""
    return [layer.self_attn for layer in model.model.layers]


#: Model types whose checkpoints hold queries, keys and values as one projection.
FUSED = {"phi3"}


class SplitProjection(nn.Module):
    """A fused ``qkv_proj`` (Phi-3) as three projections that can be watched, and exchanged."""

    def __init__(self, attention: Attention):
        super().__init__()
        self._of = (attention,)  # in a tuple: as a module it would be its own descendant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (attention,) = self._of
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        return torch.cat([part(x) for part in parts], dim=-1)


def split_fused_projections(model: CausalLM) -> None:
    """Give attention modules with a fused ``qkv_proj`` the projections that others have."""
    config = model.config
    for attention in attention_modules(model):
        fused = getattr(attention, "qkv_proj", None)
        if fused is None:
            continue
        kv_rows = config.num_key_value_heads * attention.head_dim
        rows = (config.num_attention_heads * attention.head_dim, kv_rows, kv_rows)
        for name, weight in zip(("q", "k", "v"), fused.weight.data.split(rows), strict=True):
            out_features, in_features = weight.shape
            part = nn.Linear(in_features, out_features, bias=False, device="meta")
            part.weight = nn.Parameter(weight)
            setattr(attention, f"{name}_proj", part)
        attention.qkv_proj = SplitProjection(attention)
