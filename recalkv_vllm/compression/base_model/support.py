"""Which models can be compressed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from recalkv_vllm.architectures import (
    ATTENTION_LAYERS,
    OTHER_LAYERS,
    SUPPORTED,
    VARYING_ROPE,
    Architecture,
    language_config,
)
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.refused_architectures import REFUSED

#: Fields of a config that change attention in a way that only some architectures are served with
#: (``Architecture.reads``), and most with none. A field that is absent, null, false, zero or empty
#: changes nothing.
ATTENTION_FIELDS = (
    "add_full_attention_sink_bias",
    "add_swa_attention_sink_bias",
    "alibi",
    "attention_chunk_size",
    "attention_k_eq_v",
    "attention_sinks",
    "attention_value_scale",
    "attn_config",
    "attn_logit_softcapping",
    "attn_output_gate",
    "attn_temperature_tuning",
    "clip_qkv",
    "cross_attention_layers",
    "dual_chunk_attention_config",
    "gated_attn",
    "gating",
    "kv_lora_rank",
    "linear_attention",
    "llama_4_scaling",
    "num_attention_heads_per_layer",
    "num_kv_shared_layers",
    "qk_layernorm",
    "qk_norm",
    "qk_scale_factor",
    "use_alibi",
    "use_attention_sinks",
    "use_bidirectional_attention",
    "use_qk_norm",
)
#: As :data:`ATTENTION_FIELDS`, of a RoPE's parameters.
ROPE_FIELDS = ("llama_4_scaling_beta", "mrope_section")
#: Kinds of layers of a model that is not hybrid.
LAYER_TYPES = ("full_attention", "sliding_attention")


def supported_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a Hugging Face config.

    Raises:
        InputError: the model is not supported, does something with attention that latents are not
            served with, or is compressed already.
    """
    if "recalkv" in config:
        raise InputError("the model is already compressed by recalkv; expected its base model")
    model_type = config.get("model_type")
    if model_type in REFUSED:
        raise InputError(f"model_type {model_type!r} is not supported: {REFUSED[model_type]}")
    if model_type not in SUPPORTED:
        raise InputError(
            f"model_type {model_type!r} is not supported; expected one of "
            f"{', '.join(sorted(SUPPORTED))}"
        )
    architecture = SUPPORTED[model_type]
    if architecture.multimodal:
        _check_language_model(model_type, config)
    else:
        _check_rope(model_type, config, architecture)
    # Some models call themselves by another's type, and are served by a class of their own.
    expected = (
        architecture.served_name.removeprefix("Recalkv"),
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, architecture.served_name),
    )
    names = config.get("architectures")
    if names and not {*map(str.lower, expected)} & {*map(str.lower, names)}:
        raise InputError(f"{model_type} with architectures {', '.join(names)} is not supported")
    for field in ATTENTION_FIELDS:
        if config.get(field) and field not in architecture.reads:
            raise InputError(f"{model_type} with {field} is not supported")
    known = {*ATTENTION_LAYERS, *OTHER_LAYERS} if architecture.hybrid else {*LAYER_TYPES}
    if unknown := sorted(set(config.get("layer_types") or ()) - known):
        raise InputError(f"{model_type} with layers of {', '.join(unknown)} is not supported")
    if not config.get("is_causal", True):
        raise InputError("is_causal false: expected a decoder, found bidirectional attention")
    return architecture


def _check_language_model(model_type: str, config: Mapping[str, Any]) -> None:
    text = language_config(config)
    if text is config:
        raise InputError(f"{model_type} without a text_config is not supported")
    within = supported_architecture(text)
    if within.multimodal or within.fused_qkv or within.by_transformers:
        raise InputError(f"{model_type} beside a {text.get('model_type')} is not supported")
    if config.get("quantization_config"):
        raise InputError(
            f"quantization_config: {model_type}: expected weights that are not quantized"
        )


def _check_rope(model_type: str, config: Mapping[str, Any], architecture: Architecture) -> None:
    for parameters in _ropes(config):
        for field in ROPE_FIELDS:
            if parameters.get(field) and field not in architecture.reads:
                raise InputError(f"{model_type} with {field} of RoPE is not supported")
        rope_type = parameters.get("rope_type", parameters.get("type"))
        if architecture.by_transformers and rope_type in VARYING_ROPE:
            raise InputError(f"{model_type} with {rope_type} RoPE is not supported")


def _ropes(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Parameters of a config's RoPE, or of each kind of its layers."""
    for field in ("rope_parameters", "rope_scaling"):
        found = config.get(field)
        if isinstance(found, Mapping):
            yield found
            yield from (part for part in found.values() if isinstance(part, Mapping))
