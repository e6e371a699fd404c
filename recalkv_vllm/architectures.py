"""The supported architectures: served names, offline checks and the page of models follow from it.

Imports neither torch nor vLLM, so that every side can read it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

#: What one RMS norm of keys is over: a KV head, or all heads of a token.
KeyNorm: TypeAlias = Literal["head", "token"]

_MODELS = "vllm.model_executor.models"
#: vLLM's classes for models that it runs as transformers defines them.
_TRANSFORMERS = f"{_MODELS}.transformers:TransformersForCausalLM"
_TRANSFORMERS_MOE = f"{_MODELS}.transformers:TransformersMoEForCausalLM"
#: RoPE whose angles follow the longest sequence of a step there; vLLM's own classes fix them.
VARYING_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one ``model_type`` is compressed and served.

    Args:
        vllm_class: vLLM's class that the served class derives from, as ``module:class``.
        examples: models of the type, and what sets them apart; for ``docs/supported_models.md``.
        name: in ``architectures`` of a model's config, where vLLM's class is called otherwise.
        fused_qkv: checkpoints hold queries, keys and values as one projection ``qkv_proj``.
        reads: fields of a config that change attention, and that serving follows.
        key_norm: of keys before RoPE, if it has one.
        key_norm_field: field of a config without which it has none.
        attention: what vLLM's decoder layers call their attention module.
        hidden_states_first: and give it, before positions.
        multimodal: the language model is a part of it, of a supported type of its own.
        text_alone: and images are not served, since they give tokens other positions than text.
        fuses_when_loading: vLLM's class fuses projections where it loads them, and its mapper of
            names does not say so.
        hybrid: some layers have no attention, and stay as they are.
    """

    vllm_class: str
    examples: str
    name: str | None = None
    fused_qkv: bool = False
    reads: tuple[str, ...] = ()
    key_norm: KeyNorm | None = None
    key_norm_field: str | None = None
    attention: str = "self_attn"
    hidden_states_first: bool = False
    multimodal: bool = False
    text_alone: bool = False
    fuses_when_loading: bool = False
    hybrid: bool = False

    @property
    def served_name(self) -> str:
        """Name in a compressed checkpoint's ``architectures``, registered with vLLM."""
        return "Recalkv" + (self.name or self.vllm_class.partition(":")[2])

    @property
    def by_transformers(self) -> bool:
        """Whether vLLM runs the model as transformers defines it, having no class of its own."""
        return self.vllm_class in (_TRANSFORMERS, _TRANSFORMERS_MOE)


#: By the ``model_type`` of a Hugging Face config.
SUPPORTED = {
    "llama": Architecture(
        f"{_MODELS}.llama:LlamaForCausalLM",
        "Llama 2, 3.x (llama3, linear, dynamic and YaRN RoPE); SmolLM2",
    ),
    "mistral": Architecture(
        f"{_MODELS}.mistral:MistralForCausalLM", "Mistral 7B, with and without sliding window"
    ),
    "mixtral": Architecture(
        f"{_MODELS}.mixtral:MixtralForCausalLM", "Mixtral; experts stay as they are"
    ),
    "qwen2": Architecture(f"{_MODELS}.qwen2:Qwen2ForCausalLM", "Qwen2, Qwen2.5 (QKV bias)"),
    "qwen3": Architecture(
        f"{_MODELS}.qwen3:Qwen3ForCausalLM",
        "Qwen3 (norm of every query and key head)",
        key_norm="head",
    ),
    "qwen3_moe": Architecture(
        f"{_MODELS}.qwen3_moe:Qwen3MoeForCausalLM",
        "Qwen3-MoE; experts stay as they are",
        key_norm="head",
    ),
    "phi3": Architecture(
        f"{_MODELS}.phi3:Phi3ForCausalLM",
        "Phi-3, Phi-4-mini (fused projections, partial and long RoPE)",
        fused_qkv=True,
    ),
    "granite": Architecture(
        f"{_MODELS}.granite:GraniteForCausalLM", "Granite 3 (attention multiplier)"
    ),
    "granite_swa": Architecture(
        f"{_MODELS}.granite:GraniteForCausalLM",
        "Granite SWA (attention sinks; windows and layers without RoPE)",
        name="GraniteSWAForCausalLM",
        reads=("attention_sinks",),
    ),
    "granitemoe_swa": Architecture(
        f"{_MODELS}.granitemoeshared:GraniteMoeSharedForCausalLM",
        "Granite SWA, mixture of experts (attention sinks)",
        name="GraniteMoeSWAForCausalLM",
        reads=("attention_sinks",),
    ),
    "gpt_oss": Architecture(
        f"{_MODELS}.gpt_oss:GptOssForCausalLM",
        "gpt-oss (attention sinks, biases, windows; mixture of experts)",
        attention="attn",
        hidden_states_first=True,
        fuses_when_loading=True,
    ),
    "llava": Architecture(
        f"{_MODELS}.llava:LlavaForConditionalGeneration",
        "LLaVA 1.5 (CLIP tower beside a Llama)",
        multimodal=True,
    ),
    "llava_next": Architecture(
        f"{_MODELS}.llava_next:LlavaNextForConditionalGeneration",
        "LLaVA-NeXT (CLIP tower beside a Mistral or Llama)",
        multimodal=True,
    ),
    "mistral3": Architecture(
        f"{_MODELS}.mistral3:Mistral3ForConditionalGeneration",
        "Mistral Small 3.1, 3.2 (Pixtral tower beside a Mistral)",
        multimodal=True,
    ),
    "gemma2": Architecture(
        f"{_MODELS}.gemma2:Gemma2ForCausalLM",
        "Gemma 2 (soft cap, alternating windows)",
        reads=("attn_logit_softcapping",),
    ),
    "gemma3_text": Architecture(
        f"{_MODELS}.gemma3:Gemma3ForCausalLM",
        "Gemma 3, text models (key norm, windows with a RoPE of their own)",
        key_norm="head",
    ),
    "gemma3": Architecture(
        f"{_MODELS}.gemma3_mm:Gemma3ForConditionalGeneration",
        "Gemma 3 of 4B and more, for text alone",
        multimodal=True,
    ),
    "qwen2_vl": Architecture(
        f"{_MODELS}.qwen2_vl:Qwen2VLForConditionalGeneration",
        "Qwen2-VL, for text alone",
        multimodal=True,
        text_alone=True,
    ),
    "qwen2_5_vl": Architecture(
        f"{_MODELS}.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration",
        "Qwen2.5-VL, for text alone",
        multimodal=True,
        text_alone=True,
    ),
    "qwen3_vl": Architecture(
        f"{_MODELS}.qwen3_vl:Qwen3VLForConditionalGeneration",
        "Qwen3-VL, for text alone",
        multimodal=True,
        text_alone=True,
    ),
    "qwen3_vl_moe": Architecture(
        f"{_MODELS}.qwen3_vl_moe:Qwen3VLMoeForConditionalGeneration",
        "Qwen3-VL, mixture of experts, for text alone",
        multimodal=True,
        text_alone=True,
    ),
    "qwen3_5": Architecture(
        f"{_MODELS}.qwen3_5:Qwen3_5ForConditionalGeneration",
        "Qwen3.5, for text alone",
        multimodal=True,
        text_alone=True,
        hybrid=True,
    ),
    "qwen3_5_moe": Architecture(
        f"{_MODELS}.qwen3_5:Qwen3_5MoeForConditionalGeneration",
        "Qwen3.5, mixture of experts, for text alone",
        multimodal=True,
        text_alone=True,
        hybrid=True,
    ),
    "gemma": Architecture(
        f"{_MODELS}.gemma:GemmaForCausalLM", "Gemma 1, CodeGemma (one KV head in 2B)"
    ),
    "cohere": Architecture(
        f"{_MODELS}.commandr:CohereForCausalLM",
        "Command R (interleaved RoPE; attention and MLP side by side)",
    ),
    "cohere2": Architecture(
        f"{_MODELS}.commandr:CohereForCausalLM",
        "Command R7B, Command A (windows with RoPE, full layers without)",
        name="Cohere2ForCausalLM",
    ),
    "exaone4": Architecture(
        f"{_MODELS}.exaone4:Exaone4ForCausalLM",
        "EXAONE 4 (key norm; windows with RoPE, full layers without)",
        key_norm="head",
    ),
    "glm4": Architecture(
        f"{_MODELS}.glm4:Glm4ForCausalLM", "GLM-4 0414, GLM-Z1 (interleaved RoPE of half a head)"
    ),
    "glm4_moe": Architecture(
        f"{_MODELS}.glm4_moe:Glm4MoeForCausalLM",
        "GLM-4.5, GLM-4.6 (QKV bias, key norm)",
        reads=("use_qk_norm",),
        key_norm="head",
        key_norm_field="use_qk_norm",
    ),
    "ernie4_5": Architecture(
        f"{_MODELS}.ernie45:Ernie4_5ForCausalLM", "ERNIE 4.5, dense (interleaved RoPE)"
    ),
    "ernie4_5_moe": Architecture(
        f"{_MODELS}.ernie45_moe:Ernie4_5_MoeForCausalLM", "ERNIE 4.5, mixture of experts"
    ),
    "granitemoe": Architecture(
        f"{_MODELS}.granitemoe:GraniteMoeForCausalLM", "Granite 3, mixture of experts"
    ),
    "granitemoeshared": Architecture(
        f"{_MODELS}.granitemoeshared:GraniteMoeSharedForCausalLM",
        "Granite 4 preview (mixture with shared experts)",
    ),
    "granitemoehybrid": Architecture(
        f"{_MODELS}.granitemoehybrid:GraniteMoeHybridForCausalLM",
        "Granite 4 (Mamba 2 layers stay as they are)",
        fuses_when_loading=True,
        hybrid=True,
    ),
    "qwen3_next": Architecture(
        f"{_MODELS}.qwen3_next:Qwen3NextForCausalLM",
        "Qwen3-Next (gated delta nets stay as they are; gated attention, key norm, partial RoPE)",
        reads=("attn_output_gate",),
        key_norm="head",
        hybrid=True,
    ),
    "qwen3_5_text": Architecture(
        f"{_MODELS}.qwen3_5:Qwen3_5ForCausalLM",
        "Qwen3.5 without its tower (as Qwen3-Next)",
        reads=("attn_output_gate", "mrope_section"),
        key_norm="head",
        hybrid=True,
    ),
    "qwen3_5_moe_text": Architecture(
        f"{_MODELS}.qwen3_5:Qwen3_5MoeForCausalLM",
        "Qwen3.5 without its tower, mixture of experts",
        reads=("attn_output_gate", "mrope_section"),
        key_norm="head",
        hybrid=True,
    ),
    "hyperclovax": Architecture(
        f"{_MODELS}.hyperclovax:HyperCLOVAXForCausalLM", "HyperCLOVA X SEED (attention multiplier)"
    ),
    "nemotron": Architecture(
        f"{_MODELS}.nemotron:NemotronForCausalLM", "Nemotron-4, Minitron (partial RoPE)"
    ),
    "phimoe": Architecture(
        f"{_MODELS}.phimoe:PhiMoEForCausalLM", "Phi-3.5-MoE (biases, long RoPE)"
    ),
    "apertus": Architecture(
        f"{_MODELS}.apertus:ApertusForCausalLM", "Apertus (key norm)", key_norm="head"
    ),
    "qwen2_moe": Architecture(
        f"{_MODELS}.qwen2_moe:Qwen2MoeForCausalLM", "Qwen1.5-MoE, Qwen2-MoE (QKV bias)"
    ),
    "stablelm": Architecture(
        f"{_MODELS}.stablelm:StablelmForCausalLM",
        "StableLM 2, StableLM 3B (partial RoPE)",
        name="StableLmForCausalLM",
    ),
    "exaone_moe": Architecture(
        f"{_MODELS}.exaone_moe:ExaoneMoeForCausalLM",
        "K-EXAONE (as EXAONE 4, mixture of experts)",
        key_norm="head",
    ),
    "cohere2_moe": Architecture(f"{_MODELS}.cohere2_moe:Cohere2MoeForCausalLM", "Cohere 2 MoE"),
    "smollm3": Architecture(
        _TRANSFORMERS, "SmolLM3 (every fourth layer without RoPE)", name="SmolLM3ForCausalLM"
    ),
    "starcoder2": Architecture(
        _TRANSFORMERS, "StarCoder2 (biases, sliding window)", name="Starcoder2ForCausalLM"
    ),
    "glm": Architecture(
        _TRANSFORMERS, "GLM-4 9B, GLM-Edge (interleaved RoPE of half a head)", name="GlmForCausalLM"
    ),
    "seed_oss": Architecture(_TRANSFORMERS, "Seed-OSS (QKV bias)", name="SeedOssForCausalLM"),
    "arcee": Architecture(_TRANSFORMERS, "Arcee AFM", name="ArceeForCausalLM"),
    "helium": Architecture(_TRANSFORMERS, "Helium (interleaved RoPE)", name="HeliumForCausalLM"),
    "olmo": Architecture(_TRANSFORMERS, "OLMo 1", name="OlmoForCausalLM"),
    "olmo2": Architecture(
        _TRANSFORMERS,
        "OLMo 2 (norm over all key heads)",
        name="Olmo2ForCausalLM",
        key_norm="token",
    ),
    "olmoe": Architecture(
        f"{_MODELS}.olmoe:OlmoeForCausalLM",
        "OLMoE (norm over all key heads; mixture of experts)",
        key_norm="token",
    ),
    "flex_olmo": Architecture(
        _TRANSFORMERS_MOE,
        "FlexOlmo (norm over all key heads; mixture of experts)",
        name="FlexOlmoForCausalLM",
        key_norm="token",
    ),
    "cwm": Architecture(_TRANSFORMERS, "Code World Model (windows)", name="CwmForCausalLM"),
    "ministral": Architecture(_TRANSFORMERS, "Ministral 8B (windows)", name="MinistralForCausalLM"),
    "dots1": Architecture(
        _TRANSFORMERS_MOE,
        "dots.llm1 (key norm; mixture of experts)",
        name="Dots1ForCausalLM",
        key_norm="head",
    ),
    "jais2": Architecture(_TRANSFORMERS, "Jais 2 (biases)", name="Jais2ForCausalLM"),
    "vaultgemma": Architecture(
        _TRANSFORMERS, "VaultGemma", name="VaultGemmaForCausalLM", reads=("attn_logit_softcapping",)
    ),
    "solar_open": Architecture(
        _TRANSFORMERS_MOE, "Solar Open (mixture of experts)", name="SolarOpenForCausalLM"
    ),
}


#: Types of language models within others that are, for text alone, the model of another type: its
#: tokens have one position each, whatever the sections of RoPE.
ON_TEXT_ALONE = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
_SECTIONS = ("mrope_section", "mrope_interleaved")


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a Hugging Face config that describes the language model; all of it if it is that
    model's alone. One of :data:`ON_TEXT_ALONE` as the model that it is there."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return config
    model_type = ON_TEXT_ALONE.get(text.get("model_type", ""))
    if model_type is None:
        return text
    return {
        name: _without_sections(value) if name in ("rope_parameters", "rope_scaling") else value
        for name, value in {**text, "model_type": model_type}.items()
    }


def _without_sections(rope: Any) -> Any:
    if not isinstance(rope, Mapping):
        return rope
    return {name: value for name, value in rope.items() if name not in _SECTIONS}


_PREFIX = re.compile(r"^(model\.language_model|language_model\.model)\.")
_HEAD = re.compile(r"^language_model\.lm_head\.")


def language_name(name: str) -> str:
    """What a tensor of a model of several modalities is called in its language model by itself.

    transformers and vLLM have used two orders of names within the whole; other tensors keep theirs.
    """
    return _HEAD.sub("lm_head.", _PREFIX.sub("model.", name))


#: ``layer_types`` of layers with attention, and of those without that hybrid models have.
ATTENTION_LAYERS = ("full_attention", "sliding_attention", "attention")
OTHER_LAYERS = ("linear_attention", "mamba", "conv")


def attention_layers(config: Mapping[str, Any], num_layers: int) -> Sequence[int] | None:
    """Which of a Hugging Face config's decoder layers have attention.

    Args:
        config: of a language model.
        num_layers: decoder layers that it has.

    Returns:
        Their indices; None for a hybrid model whose config does not say.
    """
    architecture = SUPPORTED.get(config.get("model_type", ""))
    if architecture is None or not architecture.hybrid:
        return range(num_layers)
    kinds = config.get("layer_types") or config.get("layers_block_type")
    if not isinstance(kinds, list | tuple) or len(kinds) != num_layers:
        return None
    return tuple(i for i, kind in enumerate(kinds) if kind in ATTENTION_LAYERS)


def key_norm(config: Mapping[str, Any]) -> KeyNorm | None:
    """The key norm of a Hugging Face config's model; None for types that are not supported."""
    config = language_config(config)
    architecture = SUPPORTED.get(config.get("model_type", ""))
    if architecture is None:
        return None
    field = architecture.key_norm_field
    return architecture.key_norm if field is None or config.get(field) else None


def has_fused_qkv(model_type: str | None) -> bool:
    """Whether checkpoints of this type, supported or not, hold a fused ``qkv_proj``."""
    return model_type in SUPPORTED and SUPPORTED[model_type].fused_qkv
