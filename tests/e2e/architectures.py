"""Small configurations of supported architectures, each with what sets it apart."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Dots1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GlmConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
)

# Large initial weights: logits far apart, so that equal tokens mean equal computation.
SIZES = {
    "vocab_size": 512,
    "num_hidden_layers": 3,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
WINDOW = {"sliding_window": 48}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = {"num_experts_per_tok": 2, "intermediate_size": 64}


def rope(rope_type: str, **parameters) -> dict:
    return {
        "rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters},
    }


def long_rope(trained_length: int) -> dict:
    return {
        **rope(
            "longrope",
            short_factor=[1.0 + i / 8 for i in range(8)],
            long_factor=[1.0 + i for i in range(8)],
            original_max_position_embeddings=trained_length,
            partial_rotary_factor=0.5,
        ),
        "original_max_position_embeddings": trained_length,
        "partial_rotary_factor": 0.5,
    }


CONFIGS = {
    "llama-linear-rope": LlamaConfig(**SIZES, **rope("linear", factor=2.0)),
    "llama-dynamic-rope": LlamaConfig(**SIZES, **rope("dynamic", factor=2.0)),
    "llama-yarn-rope": LlamaConfig(
        **SIZES, **rope("yarn", factor=4.0, original_max_position_embeddings=256)
    ),
    "llama3-rope": LlamaConfig(
        **SIZES,
        **rope(
            "llama3",
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=256,
        ),
    ),
    "llama-mha-bias": LlamaConfig(
        **{**SIZES, "num_key_value_heads": 8, "attention_bias": True, "head_dim": 48}
    ),
    "mistral-window": MistralConfig(**SIZES, **WINDOW),
    "qwen2-tied": Qwen2Config(**{**SIZES, "tie_word_embeddings": True}, use_sliding_window=False),
    "qwen3": Qwen3Config(**SIZES, head_dim=48),
    "phi3-short-rope": Phi3Config(**SIZES, **long_rope(1024)),
    "phi3-long-rope": Phi3Config(**SIZES, **long_rope(256)),
    "granite": GraniteConfig(
        **SIZES, attention_multiplier=0.05, embedding_multiplier=3.0, logits_scaling=2.0
    ),
    "mixtral": MixtralConfig(**{**SIZES, **EXPERTS}, num_local_experts=4, sliding_window=None),
    "qwen3-moe": Qwen3MoeConfig(
        **{**SIZES, **EXPERTS}, head_dim=32, num_experts=4, moe_intermediate_size=64
    ),
    # Its other layers vLLM runs on a CPU in bfloat16 alone: see ``test_hybrid.py``.
    "qwen3-next-attention": Qwen3NextConfig(
        **{**SIZES, **EXPERTS},
        **rope("default", partial_rotary_factor=0.25),
        head_dim=64,
        layer_types=["full_attention"] * 3,
        num_experts=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    ),
    "gemma2": Gemma2Config(
        **{**SIZES, **WINDOW, "tie_word_embeddings": True},
        head_dim=32,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=3.0,
    ),
    "gemma3": Gemma3TextConfig(
        **{**SIZES, **WINDOW, "num_hidden_layers": 4},
        head_dim=32,
        query_pre_attn_scalar=20,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    ),
    "gpt-oss": GptOssConfig(
        **{**SIZES, **EXPERTS, **WINDOW},
        head_dim=32,
        num_local_experts=4,
        **rope(
            "yarn",
            factor=4.0,
            beta_fast=32.0,
            beta_slow=1.0,
            truncate=False,
            original_max_position_embeddings=256,
        ),
    ),
    "cohere2": Cohere2Config(
        **{**SIZES, **WINDOW, "tie_word_embeddings": True}, head_dim=32, layer_types=MIXED
    ),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layer_interval=2, use_sliding_window=False),
    "glm": GlmConfig(**SIZES, head_dim=32, attention_bias=True),
    "olmo2": Olmo2Config(**SIZES),
    "dots1": Dots1Config(
        **{**SIZES, **EXPERTS},
        n_routed_experts=4,
        n_shared_experts=1,
        moe_intermediate_size=64,
        first_k_dense_replace=1,
    ),
}


def save_random_model(
    config, directory: Path, seed: int = 0, auto_class=AutoModelForCausalLM
) -> Path:
    """Write a model of ``config`` with random weights, biases and norms."""
    torch.manual_seed(seed)
    network = auto_class.from_config(config)
    for name, parameter in network.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
        elif name.endswith(".sinks"):
            # Near the log-sum-exp of the tokens that a window holds.
            torch.nn.init.normal_(parameter, mean=4.0, std=2.0)
        elif "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    network.save_pretrained(directory)
    return directory
