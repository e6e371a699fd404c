"""At full rank, greedy tokens equal stock vLLM's, whatever the scheduler does with the requests.

Float32 throughout: in lower precision the stock model's own near-ties flip between runs.
"""

import pytest

from tests.e2e.conftest import run_engines

#: Smaller than the long prompt, which is then prefilled in chunks, with context.
BATCH_BUDGET = 256
ROOMY = {"max_num_batched_tokens": BATCH_BUDGET, "max_num_seqs": 16, "block_size": 32}
#: 20 blocks of 32 tokens: eight growing requests do not fit, so some are preempted.
TIGHT = {**ROOMY, "num_gpu_blocks_override": 20, "max_model_len": 512}
RECALKV = {"attention_backend": "recalkv"}


@pytest.fixture(scope="session")
def runs(model, full_rank, prompts):
    """The same batches through stock and compressed engines, roomy and tight."""
    questions, long = prompts["questions"], prompts["long"]
    short = {"max_tokens": 16}
    roomy = [
        {"prompts": [questions[0]], "sampling": short},
        {"prompts": questions, "sampling": short},
        {"prompts": questions[:16], "sampling": {"max_tokens": 24, "ignore_eos": True}},
        {"prompts": [long], "sampling": short},
        # The same text once more, beside requests without a cached prefix.
        {"prompts": [questions[1], long, long[:333], questions[2]], "sampling": short},
    ]
    tight = [{"prompts": questions[:8], "sampling": {"max_tokens": 64, "ignore_eos": True}}]
    jobs = [
        {"engine": {**engine, "model": str(path), **extra}, "batches": batches}
        for path, extra in ((model, {}), (full_rank, RECALKV))
        for engine, batches in ((ROOMY, roomy), (TIGHT, tight))
    ]
    stock_roomy, stock_tight, ours_roomy, ours_tight = run_engines(*jobs)
    return {
        "stock": {"roomy": stock_roomy, "tight": stock_tight},
        "ours": {"roomy": ours_roomy, "tight": ours_tight},
    }


def roomy_batch(runs, index):
    return runs["ours"]["roomy"]["tokens"][index], runs["stock"]["roomy"]["tokens"][index]


def test_one_prompt(runs):
    ours, stock = roomy_batch(runs, 0)
    assert ours == stock


def test_many_prompts(runs):
    ours, stock = roomy_batch(runs, 1)
    assert len(ours) >= 20
    assert ours == stock


def test_sixteen_at_once(runs):
    ours, stock = roomy_batch(runs, 2)
    assert [len(tokens) for tokens in ours] == [24] * 16
    assert ours == stock


def test_chunked_prefill_with_context(runs, prompts):
    assert len(prompts["long"]) > 2 * BATCH_BUDGET
    ours, stock = roomy_batch(runs, 3)
    assert ours == stock


def test_prefix_caching(runs, prompts):
    ours, stock = roomy_batch(runs, 4)
    assert ours == stock
    hits = {name: run["roomy"]["metrics"]["vllm:prefix_cache_hits"] for name, run in runs.items()}
    assert hits["ours"] == hits["stock"]
    assert hits["ours"] >= len(prompts["long"]) - 32


def test_preemption(runs):
    for run in runs.values():
        assert run["tight"]["metrics"]["vllm:num_preemptions"] > 0
    assert runs["ours"]["tight"]["tokens"] == runs["stock"]["tight"]["tokens"]
    # Preempted requests were computed again from their latents' beginning, not from leftovers.
    undisturbed = [tokens[:24] for tokens in runs["ours"]["tight"]["tokens"][0]]
    assert undisturbed == runs["ours"]["roomy"]["tokens"][2][:8]


def test_reference_ops_give_the_same_tokens(runs, full_rank, prompts):
    batch = {"prompts": prompts["questions"][:2], "sampling": {"max_tokens": 16}}
    job = {"engine": {**ROOMY, **RECALKV, "model": str(full_rank)}, "batches": [batch]}
    (reference,) = run_engines(job, RECALKV_KERNEL="reference")
    assert reference["tokens"][0] == runs["stock"]["roomy"]["tokens"][1][:2]
