"""Options that are refused by name, on stand-ins for configurations that need other machines."""

from types import SimpleNamespace

import pytest
import torch

from recalkv_vllm.serving.startup.options import unsupported_option

FULL, WINDOWS = (
    SimpleNamespace(hf_text_config=SimpleNamespace(sliding_window=width)) for width in (None, 64)
)


def configuration(**changes):
    """As much of a ``VllmConfig`` as is looked at, with nothing to refuse."""
    parts = {
        "parallel_config": {
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
        },
        "model_config": {
            "dtype": torch.float32,
            "architectures": ["RecalkvLlamaForCausalLM"],
            "is_mm_prefix_lm": False,
            "supports_multimodal_inputs": True,
            "hf_text_config": FULL.hf_text_config,
        },
        "cache_config": {"cache_dtype": "auto"},
        "scheduler_config": {"disable_hybrid_kv_cache_manager": False},
    }
    for part, values in changes.items():
        parts.setdefault(part, {}).update(values)
    return SimpleNamespace(
        **{
            "speculative_config": None,
            "kv_transfer_config": None,
            "lora_config": None,
            **{name: SimpleNamespace(**values) for name, values in parts.items()},
        }
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"parallel_config": {"decode_context_parallel_size": 2}},
            "--decode-context-parallel-size: expected 1, found 2",
        ),
        (
            {"parallel_config": {"prefill_context_parallel_size": 2}},
            "--prefill-context-parallel-size: expected 1, found 2",
        ),
        (
            {
                "speculative_config": {"method": "draft_model", "draft_model_config": FULL},
                "model_config": vars(WINDOWS),
            },
            "--speculative-config: beside sliding-window layers, draft_model needs "
            "--disable-hybrid-kv-cache-manager: vLLM gives a draft model the blocks of the first "
            "cache group",
        ),
        (
            {"speculative_config": {"method": "draft_model", "draft_model_config": WINDOWS}},
            "--speculative-config: beside sliding-window layers, draft_model needs "
            "--disable-hybrid-kv-cache-manager: vLLM gives a draft model the blocks of the first "
            "cache group",
        ),
        (
            {"model_config": {"is_mm_prefix_lm": True}},
            "--limit-mm-per-prompt: expected '{\"image\": 0}' for a model whose images attend to "
            "themselves in both directions, which latents are not served with",
        ),
        (
            {"model_config": {"architectures": ["RecalkvQwen3VLForConditionalGeneration"]}},
            """--limit-mm-per-prompt: expected '{"image": 0, "video": 0}' for a model that gives """
            "images positions of several dimensions, which latents are not served with",
        ),
        (
            {
                "lora_config": {},
                "model_config": {"architectures": ["RecalkvLlavaForConditionalGeneration"]},
            },
            "--enable-lora: expected a language model alone, found one of several modalities",
        ),
        (
            {
                "speculative_config": {"method": "ngram"},
                "model_config": {"architectures": ["RecalkvQwen3NextForCausalLM"]},
            },
            "--speculative-config: expected none for a model some of whose layers have no "
            "attention: not tested",
        ),
        (
            {"speculative_config": {"method": "mlp_speculator"}},
            "--speculative-config: expected method ngram or ngram_gpu or suffix or custom_class or "
            "draft_model or eagle or eagle3 or mtp or medusa or dflash or dspark or "
            "extract_hidden_states, found mlp_speculator",
        ),
    ],
)
def test_refused(changes, message):
    assert unsupported_option(configuration(**changes), "RECALKV") == message


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "speculative_config": {"method": "draft_model", "draft_model_config": WINDOWS},
            "model_config": vars(WINDOWS),
            "scheduler_config": {"disable_hybrid_kv_cache_manager": True},
        },
    ],
)
def test_nothing_else_is(changes):
    assert unsupported_option(configuration(**changes), "RECALKV") is None
