"""The language model within a model of several modalities, by itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from recalkv_vllm.architectures import language_name


def _place(name: str) -> str:
    """``model.layers`` of ``model.layers.0.mlp.up_proj.weight``."""
    return ".".join(name.split(".")[:2])


def class_and_shapes(config: Any) -> tuple[Any, Mapping[str, torch.Size]]:
    """transformers' class of a language model, and the shapes of its tensors by name.

    Args:
        config: transformers' of the language model.
    """
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    return type(network), {name: tensor.shape for name, tensor in network.state_dict().items()}


def _oriented(tensor: torch.Tensor, shape: torch.Size | None) -> torch.Tensor:
    """Files of Qwen3-VL have the matrices of all experts, one tensor, transposed."""
    turned = tensor.ndim == 3 and shape is not None and tensor.shape != shape
    return tensor.mT.contiguous() if turned else tensor


def load_language_model(
    config: Any, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> Any:
    """What ``from_pretrained`` gives of the language model by itself, with loading information.

    Args:
        config: transformers' of the language model.
        tensors: of the whole model, by name; others are dropped one by one.
        dtype: of the weights.
    """
    if hasattr(config, "attention_dropout"):
        config.attention_dropout = 0.0
    model_class, shapes = class_and_shapes(config)
    # Of experts, files and transformers have different tensors: only where they are is the same.
    places = set(map(_place, shapes))
    own = {
        own_name: _oriented(tensor, shapes.get(own_name))
        for name, tensor in tensors
        if _place(own_name := language_name(name)) in places
    }
    # The whole model's configuration says it, by rules that differ between models.
    config.tie_word_embeddings = "lm_head.weight" not in own
    return model_class.from_pretrained(
        None, config=config, dtype=dtype, state_dict=own, output_loading_info=True
    )
