"""Small configurations of the architectures that differ from others in what surrounds attention.

Everything that attention does with them, it does with one of ``architectures.CONFIGS`` too.
"""

from __future__ import annotations

from transformers import (
    ApertusConfig,
    ArceeConfig,
    Cohere2MoeConfig,
    CohereConfig,
    CwmConfig,
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    Exaone4Config,
    ExaoneMoeConfig,
    FlexOlmoConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    GraniteMoeConfig,
    GraniteMoeHybridConfig,
    GraniteMoeSharedConfig,
    GraniteMoeSWAConfig,
    GraniteSWAConfig,
    HeliumConfig,
    HyperCLOVAXConfig,
    Jais2Config,
    MinistralConfig,
    NemotronConfig,
    OlmoConfig,
    OlmoeConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    SeedOssConfig,
    SolarOpenConfig,
    StableLmConfig,
    Starcoder2Config,
    VaultGemmaConfig,
)

from tests.e2e.architectures import EXPERTS, MIXED, SIZES, WINDOW, rope

#: vLLM's kernel of Mamba 2 for CPUs gives no states in between, which prefix caching asks for.
WITHOUT_PREFIX_CACHING = ("granitemoehybrid",)

QWEN3_5 = {
    **SIZES,
    **rope("default", partial_rotary_factor=0.25, mrope_section=[3, 3, 2], mrope_interleaved=True),
    "head_dim": 64,
    "layer_types": ["full_attention"] * 3,
}

MORE_CONFIGS = {
    # Their other layers: see ``test_hybrid.py``.
    "qwen3.5-attention": Qwen3_5TextConfig(**QWEN3_5),
    "qwen3.5-moe-attention": Qwen3_5MoeTextConfig(
        **{**QWEN3_5, **EXPERTS},
        num_experts=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    ),
    "gemma": GemmaConfig(
        **{**SIZES, "num_key_value_heads": 1, "tie_word_embeddings": True}, head_dim=48
    ),
    "cohere": CohereConfig(**{**SIZES, "tie_word_embeddings": True}),
    "exaone4": Exaone4Config(**SIZES, **WINDOW, layer_types=MIXED),
    "glm4": Glm4Config(**SIZES, head_dim=32, attention_bias=True),
    "glm4-moe": Glm4MoeConfig(
        **{**SIZES, **EXPERTS},
        head_dim=32,
        use_qk_norm=True,
        n_routed_experts=4,
        moe_intermediate_size=64,
        num_nextn_predict_layers=0,
    ),
    "ernie4_5": Ernie4_5Config(**SIZES, head_dim=32),
    "ernie4_5-moe": Ernie4_5_MoeConfig(
        **SIZES,
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=64,
        moe_layer_end_index=2,
    ),
    "granitemoe": GraniteMoeConfig(
        **{**SIZES, **EXPERTS}, attention_multiplier=0.05, num_local_experts=4
    ),
    "granitemoeshared": GraniteMoeSharedConfig(
        **{**SIZES, **EXPERTS},
        attention_multiplier=0.05,
        num_local_experts=4,
        shared_intermediate_size=64,
    ),
    "granite-swa": GraniteSWAConfig(
        **SIZES,
        **WINDOW,
        attention_multiplier=0.05,
        layer_types=MIXED,
        layer_rope_theta=[1e4, 0.0, 1e5],
    ),
    "granitemoe-swa": GraniteMoeSWAConfig(
        **{**SIZES, **EXPERTS},
        **WINDOW,
        attention_multiplier=0.05,
        layer_types=MIXED,
        num_local_experts=4,
        shared_intermediate_size=64,
    ),
    "granitemoehybrid": GraniteMoeHybridConfig(
        **{**SIZES, **EXPERTS, "num_hidden_layers": 4},
        attention_multiplier=0.05,
        num_local_experts=4,
        shared_intermediate_size=64,
        layer_types=["linear_attention", "full_attention"] * 2,
        mamba_n_heads=8,
        mamba_d_state=64,
        mamba_chunk_size=64,
    ),
    "hyperclovax": HyperCLOVAXConfig(**SIZES, head_dim=32, attention_multiplier=0.05),
    "nemotron": NemotronConfig(**SIZES, head_dim=32),
    "phimoe": PhimoeConfig(**{**SIZES, **EXPERTS}, num_local_experts=4, attention_bias=True),
    "apertus": ApertusConfig(**SIZES),
    "qwen2-moe": Qwen2MoeConfig(
        **{**SIZES, **EXPERTS},
        num_experts=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    ),
    "stablelm": StableLmConfig(**SIZES, use_qkv_bias=True),
    "exaone-moe": ExaoneMoeConfig(
        **{**SIZES, **EXPERTS, **WINDOW},
        layer_types=MIXED,
        mlp_layer_types=["dense", "sparse", "sparse"],
        num_experts=4,
        moe_intermediate_size=64,
    ),
    "cohere2-moe": Cohere2MoeConfig(
        **{**SIZES, **EXPERTS, "tie_word_embeddings": True},
        **WINDOW,
        head_dim=32,
        num_experts=4,
        layer_types=MIXED,
        mlp_layer_types=["sparse"] * 3,
    ),
    "starcoder2": Starcoder2Config(**SIZES, **WINDOW),
    "seed_oss": SeedOssConfig(**SIZES, head_dim=48),
    "arcee": ArceeConfig(**SIZES),
    "helium": HeliumConfig(**SIZES, head_dim=32),
    "olmo": OlmoConfig(**SIZES),
    "olmoe": OlmoeConfig(**{**SIZES, **EXPERTS}, num_experts=4),
    "flex-olmo": FlexOlmoConfig(**{**SIZES, **EXPERTS}, num_experts=4),
    "cwm": CwmConfig(**SIZES, **WINDOW, head_dim=32, layer_types=MIXED, **rope("default")),
    "ministral": MinistralConfig(**SIZES, **WINDOW, head_dim=32, layer_types=MIXED),
    "jais2": Jais2Config(**SIZES, head_dim=32),
    "vaultgemma": VaultGemmaConfig(
        **{**SIZES, **WINDOW},
        head_dim=32,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=3.0,
        layer_types=MIXED,
    ),
    "solar_open": SolarOpenConfig(
        **{**SIZES, **EXPERTS},
        head_dim=32,
        n_routed_experts=4,
        n_shared_experts=1,
        moe_intermediate_size=64,
    ),
}
