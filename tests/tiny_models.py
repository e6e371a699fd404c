"""Tiny models with random weights, saved as a user's model directory is."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from recalkv_vllm.compression.calibration.builtin_text import builtin_documents

VOCABULARY = 512
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama_bias": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Statistics of one test are not there for the next, unless it asks for them."""
    monkeypatch.setenv("RECALKV_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer()


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer trained on text that is always there."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [document for document, _ in zip(builtin_documents(), range(20), strict=False)]
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.fixture(scope="session")
def make_model(tokenizer, tmp_path_factory):
    """``make_model(family, **sizes)``: the directory of a tiny random model."""

    def make(family: str, dtype: torch.dtype = torch.bfloat16, **sizes):
        model_class, config_class, options = FAMILIES[family]
        torch.manual_seed(0)
        model = model_class(config_class(**{**SIZES, **options, **sizes}))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
            elif parameter.ndim == 2:
                # Wide enough that attention is far from uniform and errors show in logits.
                torch.nn.init.normal_(parameter, std=0.15)
        directory = tmp_path_factory.mktemp(family) / "model"
        model.to(dtype).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def tiny_models(make_model):
    """One directory per family."""
    return {family: make_model(family) for family in FAMILIES}


@pytest.fixture(scope="session")
def tiny(tiny_models):
    return tiny_models["llama"]
