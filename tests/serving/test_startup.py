"""Options that are refused by name, on stand-ins for configurations that need other machines."""

from types import SimpleNamespace

import pytest
import torch

from recalkv_vllm.serving.startup.options import unsupported_option


def configuration(**changes):
    """As much of a ``VllmConfig`` as is looked at, with nothing to refuse."""
    parts = {
        "parallel_config": {
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
        },
        "model_config": {
            "dtype": torch.float32,
            "hf_config": SimpleNamespace(sliding_window=None),
        },
        "cache_config": {"cache_dtype": "auto"},
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
                "speculative_config": {"method": "draft_model"},
                "model_config": {"hf_config": SimpleNamespace(sliding_window=64)},
            },
            "--speculative-config: draft_model does not go with sliding-window layers, beside "
            "which vLLM does not look for the draft model's own cache group",
        ),
        (
            {"speculative_config": {"method": "dflash"}},
            "--speculative-config: expected method ngram or ngram_gpu or suffix or custom_class or "
            "draft_model or eagle or eagle3 or mtp or medusa, found dflash",
        ),
    ],
)
def test_refused(changes, message):
    assert unsupported_option(configuration(**changes), "RECALKV") == message


def test_nothing_else_is():
    assert unsupported_option(configuration(), "RECALKV") is None
