"""Tensor, expert and pipeline parallel engines give the tokens of a single process."""

import pytest

from tests.e2e.conftest import run_engines

# One core for each of two ranks.
CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
# Stock vLLM 0.32 asserts in eager pipeline-parallel engines with a given cache size.
COMPILED_BY_NOTHING = {
    "enforce_eager": False,
    "compilation_config": {"mode": 2, "backend": "eager"},
}


@pytest.fixture(scope="module")
def stock(small, small_prompts):
    (result,) = run_engines(small_prompts.job(small))
    return result["tokens"]


def tokens(prompts, checkpoint, **engine):
    job = prompts.job(checkpoint, attention_backend="recalkv", **engine)
    (result,) = run_engines(job, **CORES)
    return result["tokens"]


def test_tensor_parallel_with_a_k_and_a_v_group_per_rank(small, small_prompts, compressed, stock):
    checkpoint = compressed(small, k_group_size=2, v_groups=2)
    assert tokens(small_prompts, checkpoint, tensor_parallel_size=2) == stock


@pytest.mark.slow
def test_tensor_parallel_with_one_group_for_all_ranks(small, small_prompts, compressed, stock):
    checkpoint = compressed(small, k_group_size=4, v_groups=1)
    assert tokens(small_prompts, checkpoint, tensor_parallel_size=2) == stock


@pytest.mark.slow
def test_expert_parallel(make_small, small_prompts, compressed):
    base = make_small("mixtral")
    (dense,) = run_engines(small_prompts.job(base))
    experts = {
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "worker_extension_cls": "expert_map.Mapped",
    }
    assert tokens(small_prompts, compressed(base), **experts) == dense["tokens"]


@pytest.mark.slow
def test_pipeline_parallel(small, small_prompts, compressed, stock):
    checkpoint = compressed(small)
    found = tokens(small_prompts, checkpoint, pipeline_parallel_size=2, **COMPILED_BY_NOTHING)
    assert found == stock


@pytest.mark.slow
def test_tensor_parallel_sinks(make_small, small_prompts, compressed):
    """A rank has those of its query heads, in the order that heads have in the checkpoint."""
    base = make_small("gpt-oss")
    (result,) = run_engines(small_prompts.job(base))
    checkpoint = compressed(base, k_group_size=2, v_groups=2)
    assert tokens(small_prompts, checkpoint, tensor_parallel_size=2) == result["tokens"]
