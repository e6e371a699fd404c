"""The supported architectures: served names, offline checks and the page of models follow from it.

Imports neither torch nor vLLM, so that every side can read it.
"""

from __future__ import annotations

from dataclasses import dataclass

_MODELS = "vllm.model_executor.models"


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one ``model_type`` is compressed and served.

    Args:
        vllm_class: vLLM's class that the served class derives from, as ``module:class``.
        examples: models of the type, and what sets them apart; for ``docs/supported_models.md``.
        fused_qkv: checkpoints hold queries, keys and values as one projection ``qkv_proj``.
    """

    vllm_class: str
    examples: str
    fused_qkv: bool = False

    @property
    def served_name(self) -> str:
        """Name in a compressed checkpoint's ``architectures``, registered with vLLM."""
        return "Recalkv" + self.vllm_class.partition(":")[2]


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
        f"{_MODELS}.qwen3:Qwen3ForCausalLM", "Qwen3 (norm of every query and key head)"
    ),
    "qwen3_moe": Architecture(
        f"{_MODELS}.qwen3_moe:Qwen3MoeForCausalLM", "Qwen3-MoE; experts stay as they are"
    ),
    "phi3": Architecture(
        f"{_MODELS}.phi3:Phi3ForCausalLM",
        "Phi-3, Phi-4-mini (fused projections, partial and long RoPE)",
        fused_qkv=True,
    ),
    "granite": Architecture(
        f"{_MODELS}.granite:GraniteForCausalLM", "Granite 3 (attention multiplier)"
    ),
    "gemma2": Architecture(
        f"{_MODELS}.gemma2:Gemma2ForCausalLM", "Gemma 2 (soft cap, alternating windows)"
    ),
    "gemma3_text": Architecture(
        f"{_MODELS}.gemma3:Gemma3ForCausalLM",
        "Gemma 3, text models (key norm, windows with a RoPE of their own)",
    ),
}


def has_fused_qkv(model_type: str | None) -> bool:
    """Whether checkpoints of this type, supported or not, hold a fused ``qkv_proj``."""
    return model_type in SUPPORTED and SUPPORTED[model_type].fused_qkv
