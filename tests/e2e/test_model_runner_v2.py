"""Model Runner V2, which every GPU server of vLLM runs: it changes no token.

On a CPU it runs with Triton's interpreter (``model_runner_v2/sitecustomize.py``).
"""

import os
from pathlib import Path

import pytest

from tests.e2e import speculators
from tests.e2e.conftest import run_engines
from tests.e2e.test_features import SCHEMA

pytestmark = pytest.mark.model_runner_v2

PATHS = str(Path(__file__).with_name("model_runner_v2")), os.environ.get("PYTHONPATH")
RUNNER_V2 = {"PYTHONPATH": os.pathsep.join(filter(None, PATHS))}
RECALKV = {"attention_backend": "recalkv"}
GREEDY = {"max_tokens": 24, "ignore_eos": True}


def on_v2(jobs, **environment):
    """Results of engine jobs by name, all under Model Runner V2."""
    results = dict(zip(jobs, run_engines(*jobs.values(), **RUNNER_V2, **environment), strict=True))
    assert all(run["metrics"]["model_runner_v2"] for run in results.values())
    return results


@pytest.fixture(scope="module")
def on_v1(small, small_prompts):
    (stock,) = run_engines(small_prompts.job(small))
    assert not stock["metrics"]["model_runner_v2"]
    return stock


@pytest.fixture(scope="module")
def runs(small, make_small, compressed, small_prompts, bands):
    checkpoint, windows = compressed(small), make_small("gemma2")
    prompts = {"prompts": small_prompts.ids, "sampling": GREEDY}
    further = (
        {"prompts": small_prompts.ids[1:3], "sampling": {"max_tokens": 60, "json_schema": SCHEMA}},
        {**prompts, "abort_after": 3},
    )
    # 12 blocks of 32 tokens hold the long request alone.
    tight = {"num_gpu_blocks_override": 13, "max_model_len": 352}
    return on_v2(
        {
            "stock": small_prompts.job(small, prompts, further[0]),
            # The same prompts again, of which blocks are cached.
            "ours": small_prompts.job(checkpoint, prompts, prompts, *further, **RECALKV),
            "tight": small_prompts.job(checkpoint, **tight, **RECALKV),
            "stock windows": small_prompts.job(windows),
            "windows": small_prompts.job(compressed(windows), **RECALKV),
            "bands": small_prompts.job(bands(small), **RECALKV),
            "bands whole": small_prompts.job(bands(small), max_num_batched_tokens=512, **RECALKV),
        }
    )


def test_tokens_equal_stock_on_either_runner(runs, on_v1):
    assert runs["stock"]["tokens"][0] == on_v1["tokens"][0]
    assert runs["ours"]["tokens"][0] == on_v1["tokens"][0]


def test_structured_output(runs):
    stock, ours = (
        [answer["text"] for answer in runs[name]["outputs"][batch]]
        for name, batch in (("stock", 1), ("ours", 2))
    )
    assert ours == stock
    assert "{" in ours[0]


def test_abort(runs):
    """A request that goes disturbs no other one, and leaves no latents behind."""
    assert runs["ours"]["tokens"][3] == runs["ours"]["tokens"][0][1:]
    assert runs["ours"]["metrics"]["vllm:num_requests_running"] == 0
    assert runs["ours"]["metrics"]["vllm:kv_cache_usage_perc"] == 0


def test_prefix_caching(runs, small_prompts):
    first, again = runs["ours"]["tokens"][:2]
    assert again == first
    cached = runs["ours"]["metrics"]["vllm:prefix_cache_hits"]
    assert cached >= len(small_prompts.ids[0]) - 32


def test_preemption(runs):
    assert runs["tight"]["metrics"]["vllm:num_preemptions"] > 0
    assert runs["tight"]["tokens"][0] == runs["stock"]["tokens"][0]


def test_sliding_windows(runs):
    assert runs["windows"]["tokens"] == runs["stock windows"]["tokens"]


def test_chunked_prefill_of_quantized_latents(runs):
    assert runs["bands"]["tokens"] == runs["bands whole"]["tokens"]


def test_triton_kernels(on_v1, compressed, small, small_prompts):
    """All that a GPU server runs but the GPU: its runner, and its kernels, interpreted."""
    few = {"prompts": small_prompts.ids[1:], "sampling": {"max_tokens": 4, "ignore_eos": True}}
    checkpoint = compressed(small)
    # Chunks of 16 tokens, and slices of 32: the longest prompt takes several.
    dense = small_prompts.job(checkpoint, few, max_num_batched_tokens=16, **RECALKV)
    jobs = {"latents": small_prompts.job(checkpoint, few, **RECALKV),
            "dense": {**dense, "dense_prefill": True}}  # fmt: skip
    runs = on_v2(jobs, RECALKV_KERNEL="triton")
    expected = [tokens[:4] for tokens in on_v1["tokens"][0][1:]]
    assert runs["latents"]["tokens"][0] == expected
    assert runs["dense"]["tokens"][0] == expected
    assert runs["dense"]["metrics"]["dense_prefill"]["earlier"] > 0


@pytest.mark.slow
def test_ngram_speculation(small, compressed, small_prompts):
    # One token over and over: what the model goes on with repeats, too, and is predicted.
    batch = {"prompts": [[7] * 80, *small_prompts.ids], "sampling": GREEDY}
    speculation = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    checkpoint = compressed(small)
    runs = on_v2(
        {
            "stock": small_prompts.job(small, batch),
            "ours": small_prompts.job(checkpoint, batch, speculative_config=speculation, **RECALKV),
        }
    )
    assert runs["ours"]["tokens"] == runs["stock"]["tokens"]
    assert runs["ours"]["metrics"]["vllm:spec_decode_num_accepted_tokens"] > 0


@pytest.mark.slow
def test_draft_model_speculation(small, compressed, small_prompts):
    checkpoint = compressed(small)
    speculation = {
        "method": "draft_model",
        "model": str(checkpoint),
        "num_speculative_tokens": 3,
    }
    runs = on_v2(
        {
            "alone": small_prompts.job(checkpoint, **RECALKV),
            "drafted": small_prompts.job(checkpoint, speculative_config=speculation, **RECALKV),
        }
    )
    assert runs["drafted"]["tokens"] == runs["alone"]["tokens"]
    assert runs["drafted"]["metrics"]["vllm:spec_decode_num_accepted_tokens"] > 0


@pytest.mark.slow
def test_blocks_drafted_in_one_pass(small, compressed, small_prompts, tmp_path, on_v1):
    """DFlash and DSpark read layers of the model, and have a cache of their own."""
    jobs = {}
    for method, head in (("dflash", speculators.dflash()), ("dspark", speculators.dspark())):
        speculation = {
            "method": method,
            "model": speculators.save_head(tmp_path / method, *head),
            "num_speculative_tokens": 3,
        }
        jobs[method] = small_prompts.job(
            compressed(small), speculative_config=speculation, **RECALKV
        )
    for run in on_v2(jobs).values():
        assert run["tokens"] == on_v1["tokens"]
        assert run["metrics"]["vllm:spec_decode_num_draft_tokens"] > 0


@pytest.mark.slow
def test_tensor_parallel(small, compressed, small_prompts, on_v1):
    checkpoint = compressed(small, k_group_size=2, v_groups=2)
    job = small_prompts.job(checkpoint, tensor_parallel_size=2, **RECALKV)
    # Inductor, which vLLM's sharded embedding asks for, would compile for Triton's backend "cpu".
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "TORCHDYNAMO_DISABLE": "1"}
    ours = on_v2({"ours": job}, **environment)["ours"]
    assert ours["tokens"] == on_v1["tokens"]
