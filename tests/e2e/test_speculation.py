"""Speculation of every kind that vLLM runs: no token changes, and what is proposed is verified.

Heads have attention and a cache of their own, beside the latents: vLLM's stock ones.
"""

import os
import random
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e import speculators
from tests.e2e.architectures import SIZES
from tests.e2e.conftest import run_engines

#: vLLM's n-gram proposer for GPUs computes anywhere, but wants pinned memory.
UNPINNED = os.pathsep.join((str(Path(__file__).with_name("unpinned")), *sys.path))
RECALKV = {"attention_backend": "recalkv"}
#: What it continues repeats, and is predicted by those that look tokens up.
REPETITION = [random.Random(3).randrange(3, SIZES["vocab_size"])] * 80
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(small_prompts):
    """``alone(model)``: greedy tokens without speculation."""
    return cache(lambda model: run_engines(small_prompts.job(model))[0]["tokens"])


@pytest.mark.parametrize(
    ("base", "method"),
    [
        ("llama3-rope", "eagle"),
        ("llama3-rope", "eagle3"),
        ("llama3-rope", "medusa"),
        # Windows on every other layer: the head's cache is in a group of its own.
        ("gemma3", "eagle"),
    ],
)
def test_heads(make_small, compressed, small_prompts, alone, tmp_path, base, method):
    """Tokens are those without a head, and as many are accepted as beside the stock model."""
    model = make_small(base)
    tokens = alone(model)
    text = speculators.continued(model, small_prompts.ids, tokens[0])
    head = speculators.save_head(tmp_path / method, *getattr(speculators, method)(text))
    speculation = {"method": method, "model": head, "num_speculative_tokens": 3}
    stock, ours = (
        run_engines(small_prompts.job(path, speculative_config=speculation, **options))[0]
        for path, options in ((model, {}), (compressed(model), RECALKV))
    )
    assert ours["tokens"] == tokens
    assert ours["metrics"][ACCEPTED] == stock["metrics"][ACCEPTED] > 0


def test_the_checkpoints_own_head(make_small, compressed, small_prompts, alone, tmp_path):
    """MTP: compression keeps the layer that predicts one token more, dense."""
    model = tmp_path / "model"
    shutil.copytree(make_small("ernie4_5-moe"), model)
    speculators.add_mtp_layer(model)
    speculation = {"method": "mtp", "num_speculative_tokens": 1}
    job = small_prompts.job(compressed(model), speculative_config=speculation, **RECALKV)
    (drafted,) = run_engines(job)
    assert drafted["tokens"] == alone(model)
    assert drafted["metrics"]["vllm:spec_decode_num_draft_tokens"] > 0


@pytest.fixture(scope="module")
def repeated(small, compressed, small_prompts):
    """``repeated(**speculation)``: a result of prompts of which one is continued by repetition."""
    greedy = {"max_tokens": 24, "ignore_eos": True}
    batch = {"prompts": [REPETITION, *small_prompts.ids], "sampling": greedy}

    @cache
    def run(**speculation):
        options = {"speculative_config": {**speculation, "num_speculative_tokens": 3}}
        job = small_prompts.job(
            compressed(small), batch, **RECALKV, **(options if speculation else {})
        )
        return run_engines(job, PYTHONPATH=UNPINNED)[0]

    return run


@pytest.mark.parametrize(
    "speculation",
    [
        {"method": "suffix"},
        {"method": "custom_class", "model": "proposer.LastToken"},
        {"method": "ngram_gpu", "prompt_lookup_max": 3},
    ],
    ids=["suffix", "custom_class", "ngram_gpu"],
)
def test_lookups(repeated, speculation):
    if speculation["method"] == "suffix":
        pytest.importorskip("arctic_inference")
    found = repeated(**speculation)
    assert found["tokens"] == repeated()["tokens"]
    assert found["metrics"][ACCEPTED] > 0


def test_hidden_states(small, compressed, small_prompts, tmp_path):
    """``extract_hidden_states`` proposes nothing; what it stores are the stock model's states."""
    one = {"max_tokens": 1}
    # vLLM's connector stores what a request leaves once another is scheduled.
    batches = [{"prompts": ids, "sampling": one} for ids in (small_prompts.ids, [[5, 6]], [[7]])]
    layers = {"eagle_aux_hidden_state_layer_ids": [1, 2]}
    speculation = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": layers},
    }
    found = []
    for name, path, options in (("stock", small, {}), ("ours", compressed(small), RECALKV)):
        transfer = {
            "kv_connector": "ExampleHiddenStatesConnector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / name)},
        }
        job = small_prompts.job(
            path, *batches, speculative_config=speculation, kv_transfer_config=transfer, **options
        )
        run_engines(job)
        stored = [load_file(file) for file in (tmp_path / name).glob("*.safetensors")]
        found.append({tuple(one["token_ids"].tolist()): one["hidden_states"] for one in stored})
    stock, ours = found
    for prompt in map(tuple, small_prompts.ids):
        states = stock[prompt]
        assert states.shape == (len(prompt), 2, SIZES["hidden_size"])
        rounding = 1e-4 * float(states.abs().max())
        torch.testing.assert_close(ours[prompt], states, rtol=0, atol=rounding)
