"""Which models can be compressed, and where their attention projections are.

All supported families share the module names of Llama (``model.layers[i].self_attn.k_proj``) and
feed the key and value projections the same input, so one table of names is all that differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from recalkv_vllm.compression.errors import InputError

#: ``model_type`` of the base config to the architecture name of the compressed checkpoint.
ARCHITECTURES = {
    "llama": "RecalkvLlamaForCausalLM",
    "mistral": "RecalkvMistralForCausalLM",
    "qwen2": "RecalkvQwen2ForCausalLM",
}


def compressed_architecture(config: Mapping[str, Any]) -> str:
    """Architecture name of the compressed form of a Hugging Face config.

    Raises:
        InputError: the model type is not supported, or the model is compressed already.
    """
    if "recalkv" in config:
        raise InputError("the model is already compressed by recalkv; expected its base model")
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise InputError(
            f"model_type {model_type!r} is not supported; expected one of "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    if "quantization_config" in config:
        raise InputError(
            "the model's weights are quantised; expected a model with floating-point weights"
        )
    return ARCHITECTURES[model_type]


#: A transformers model; what is inside has no static types there.
CausalLM = Any


class Attention(Protocol):
    """A decoder layer's attention module, as far as it is touched here."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear


def attention_modules(model: CausalLM) -> list[Attention]:
    """The attention module of every decoder layer, first layer first."""
    return [layer.self_attn for layer in model.model.layers]
