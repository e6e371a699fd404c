"""Ways to load weights other than from a checkpoint's own files."""

import shutil

import pytest
from safetensors.torch import load_file

from tests.e2e.conftest import run_engines

pytestmark = pytest.mark.slow

RECALKV = {"attention_backend": "recalkv"}


@pytest.fixture(scope="module")
def checkpoint(small, compressed):
    return compressed(small, compression=0.5, rank_allocation="uniform")


@pytest.fixture(scope="module")
def saved(checkpoint, small_prompts, tmp_path_factory):
    """Tokens of an engine, and where it has saved what it holds."""
    state = tmp_path_factory.mktemp("sharded") / "state"
    # As vLLM's example does: all but the weights.
    shutil.copytree(checkpoint, state, ignore=shutil.ignore_patterns("*.safetensors"))
    greedy = small_prompts.job(checkpoint)["batches"][0]
    job = small_prompts.job(checkpoint, greedy, {"save_sharded": str(state)}, **RECALKV)
    (result,) = run_engines(job)
    return result["tokens"][0], state


def test_sharded_state(saved, small_prompts):
    tokens, state = saved
    (path,) = state.glob("*.safetensors")
    assert {name.split(".")[-2] for name in load_file(path)} >= {"down", "k_up", "v_up"}
    (loaded,) = run_engines(small_prompts.job(state, load_format="sharded_state", **RECALKV))
    assert loaded["tokens"][0] == tokens


def test_random_weights_and_then_those_of_the_checkpoint(saved, checkpoint, small_prompts):
    greedy = small_prompts.job(checkpoint)["batches"][0]
    batches = greedy, {"reload": {"load_format": "auto"}}, greedy
    job = small_prompts.job(checkpoint, *batches, load_format="dummy", **RECALKV)
    (result,) = run_engines(job)
    assert result["outputs"][1] is None
    assert result["tokens"][2] == saved[0] != result["tokens"][0]


def test_runai_streamer(saved, checkpoint, small_prompts):
    pytest.importorskip("runai_model_streamer")
    job = small_prompts.job(checkpoint, load_format="runai_streamer", **RECALKV)
    (streamed,) = run_engines(job)
    assert streamed["tokens"][0] == saved[0]
