"""Which models can be compressed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recalkv_vllm.architectures import SUPPORTED, Architecture
from recalkv_vllm.compression.errors import InputError

#: Fields of a config that change attention in a way that latents are not served with.
UNSUPPORTED_FIELDS = ("dual_chunk_attention_config", "llama_4_scaling")


def supported_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a Hugging Face config.

    Raises:
        InputError: the model is not supported, or compressed already.
    """
    if "recalkv" in config:
        raise InputError("the model is already compressed by recalkv; expected its base model")
    model_type = config.get("model_type")
    if model_type not in SUPPORTED:
        raise InputError(
            f"model_type {model_type!r} is not supported; expected one of "
            f"{', '.join(sorted(SUPPORTED))}"
        )
    for field in UNSUPPORTED_FIELDS:
        if config.get(field) is not None:
            raise InputError(f"{model_type} with {field} is not supported")
    if not config.get("is_causal", True):
        raise InputError("is_causal false: expected a decoder, found bidirectional attention")
    return SUPPORTED[model_type]
