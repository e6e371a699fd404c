"""The asynchronous engine: input that is streamed, pauses, several engines for one model."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ASYNC_ENGINE = Path(__file__).with_name("async_engine.py")
RECALKV = {"attention_backend": "recalkv"}
# Of every engine: they may share one core.
CORES = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def asynchronous(small_prompts):
    """``asynchronous(model, **engine)``: tokens by what ``async_engine.py`` does."""

    def run(model, **options):
        job = small_prompts.job(model, **options)
        done = subprocess.run(
            [sys.executable, ASYNC_ENGINE],
            input=json.dumps({"engine": job["engine"], "prompts": small_prompts.ids}),
            capture_output=True,
            text=True,
            env={**os.environ, **CORES},
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return cache(run)


def test_streamed_input(asynchronous, small, compressed):
    stock, ours = asynchronous(small), asynchronous(compressed(small), **RECALKV)
    assert ours["streamed input"] == stock["streamed input"]


@pytest.mark.parametrize("kind", ["paused", "paused and cleared"])
def test_pause_and_resume(asynchronous, small, compressed, kind):
    stock, ours = asynchronous(small), asynchronous(compressed(small), **RECALKV)
    assert ours[kind] == ours["at once"] == stock["at once"]


def test_data_parallel(asynchronous, small, compressed):
    stock = asynchronous(small)
    ours = asynchronous(compressed(small), data_parallel_size=2, **RECALKV)
    assert ours["at once"] == stock["at once"]
    assert len(ours["engines"]) == 2
    assert min(ours["engines"]) > 0
