"""Small random models of every supported architecture, compressed at full rank and served."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from tests.e2e.conftest import run_engines, run_recalkv

# Large initial weights: logits far apart, so that equal tokens mean equal computation.
SIZES = {
    "num_hidden_layers": 3,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
CONFIGS = {
    "llama3-rope": LlamaConfig(
        **SIZES,
        num_key_value_heads=4,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    ),
    "llama-mha": LlamaConfig(**SIZES, num_key_value_heads=8, attention_bias=True),
    "mistral-window": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=48),
    "qwen2-tied": Qwen2Config(
        **{**SIZES, "tie_word_embeddings": True}, num_key_value_heads=2, use_sliding_window=False
    ),
}


@pytest.fixture(scope="module")
def runs(model, prompts, tmp_path_factory):
    """Greedy tokens of stock and compressed engines for each configuration."""
    directory = tmp_path_factory.mktemp("architectures")
    tokenizer = AutoTokenizer.from_pretrained(model)
    batch = {
        "prompts": [prompts["long"][:300], *prompts["questions"][:4]],
        "sampling": {"max_tokens": 24, "ignore_eos": True},
    }
    jobs = []
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        config.vocab_size = len(tokenizer)
        base, compressed = directory / name, directory / f"{name}-full"
        network = AutoModelForCausalLM.from_config(config)
        for parameter_name, parameter in network.named_parameters():
            if parameter_name.endswith(".bias"):
                torch.nn.init.normal_(parameter)
        network.save_pretrained(base)
        tokenizer.save_pretrained(base)
        run_recalkv("compress", base, "-o", compressed, "--compression", 0)
        engine = {"max_num_batched_tokens": 128, "max_model_len": 512, "block_size": 32}
        jobs += [
            {"engine": {**engine, "model": str(base)}, "batches": [batch]},
            {
                "engine": {**engine, "model": str(compressed), "attention_backend": "recalkv"},
                "batches": [batch],
            },
        ]
    results = run_engines(*jobs)
    return {
        name: (stock["tokens"][0], ours["tokens"][0])
        for name, stock, ours in zip(CONFIGS, results[::2], results[1::2], strict=True)
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_full_rank_equals_stock(runs, name):
    stock, ours = runs[name]
    assert len({tuple(tokens) for tokens in stock}) == len(stock)
    assert ours == stock
