"""As users serve: no ``--dtype``, which is bfloat16 for the test model; equality needs float32."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.conftest import run_engines

#: More than plain bfloat16 errs, in nats per token: scheduling changes how sums are rounded.
FLOOR = 0.01


@pytest.fixture(scope="module")
def text(prompts):
    return prompts["long"][:400]


@pytest.fixture(scope="module")
def served(half, text, prompts):
    # The text does not fit one step: its second part is prefilled with context.
    engine = {"model": str(half), "dtype": "auto", "max_num_batched_tokens": 256}
    batch = {
        "prompts": [text, prompts["questions"][0]],
        "sampling": {"max_tokens": 16, "ignore_eos": True, "prompt_logprobs": 0, "logprobs": 0},
    }
    return run_engines({"engine": engine, "batches": [batch]})[0]


@torch.inference_mode()
def transformers_log_probabilities(model, text, dtype):
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    logits = network(torch.tensor([text])).logits[0, :-1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(text[1:])[:, None])[:, 0]


def test_log_probabilities_are_as_good_as_transformers(served, half, text):
    found = served["outputs"][0][0]["prompt_logprobs"][1:]
    ours = torch.tensor([at[str(token)] for token, at in zip(text[1:], found, strict=True)])
    exact = transformers_log_probabilities(half, text, torch.float32)
    theirs = transformers_log_probabilities(half, text, torch.bfloat16)
    error = (ours - exact).abs().mean()
    assert error <= 2 * (theirs - exact).abs().mean() + FLOOR
    # Rounding is there at all: this was no float32 engine.
    assert error > 1e-4


def test_answers_are_whole(served):
    for answer in served["outputs"][0]:
        assert len(answer["samples"][0]) == 16
        chosen = zip(answer["samples"][0], answer["logprobs"], strict=True)
        assert all(math.isfinite(at[str(token)]) for token, at in chosen)
