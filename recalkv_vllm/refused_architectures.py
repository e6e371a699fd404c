"""Model types that vLLM serves and we do not, and why; the offline tool and the page say so."""

from __future__ import annotations

#: Reason, and the types of models that it holds for.
REASONS = {
    "norms of queries and keys that vLLM computes as one": ("minimax_m2",),
    "norms of queries and keys after RoPE": (
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "nanochat",
    ),
    "keys and values of different head sizes": ("mimo_v2_flash",),
    "gates on what attention gives, of a projection of their own": ("afmoe", "laguna"),
    "scales that depend on the position": ("llama4", "llama4_text", "ministral3"),
    "a RoPE of its own for each kind of layer, in a model that vLLM runs by transformers": (
        "mellum",
        "olmo3",
    ),
    "layers that share another layer's cache": (
        "gemma3n",
        "gemma3n_text",
        "gemma4",
        "gemma4_text",
    ),
    "layers without attention, and in others attention under other names than self_attn.q_proj, "
    "k_proj, v_proj and o_proj, or within another module": (
        "bamba",
        "falcon_h1",
        "jamba",
        "lfm2",
        "lfm2_moe",
        "nemotron_h",
        "zamba2",
    ),
    "layers of linear attention that vLLM 0.32 runs on GPUs only, so that no test serves them": (
        "olmo_hybrid",
    ),
    "a cache of latents already (MLA)": (
        "axk1",
        "deepseek_v2",
        "deepseek_v3",
        "glm4_moe_lite",
        "kimi_linear",
        "longcat_flash",
        "minicpm3",
        "mistral4",
        "youtu",
    ),
    "positions of images in several dimensions": ("glm4v", "glm4v_moe"),
    "a language model within a model of several modalities": ("internvl",),
    "projections under other names than q_proj, k_proj, v_proj and o_proj": (
        "bloom",
        "dbrx",
        "falcon",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gptj",
        "mpt",
        "opt",
        "persimmon",
        "phi",
    ),
    "code that comes with the model: transformers has no class, and none is downloaded": (
        "bailing_moe",
        "exaone",
        "internlm2",
        "internlm3",
        "mimo",
        "minicpm",
        "orion",
        "telechat2",
    ),
}

#: By the ``model_type`` of a Hugging Face config.
REFUSED = {
    model_type: reason for reason, model_types in REASONS.items() for model_type in model_types
}
