"""Latents of a prompt go from the engine that prefilled it to the one that continues it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recalkv_vllm.checkpoint import RecalkvConfig, read_hf_config
from tests.e2e.conftest import run_engines

SCRIPT = Path(__file__).with_name("prefill_and_decode.py")
#: Two engines may share one core; transfers stay on this machine.
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
}
GREEDY = {"max_tokens": 24, "ignore_eos": True}
SETTINGS = {"compression": 0.5, "method": "kfac", "k_group_size": None, "num_samples": 16}


@pytest.mark.slow
def test_nixl(small, compressed, small_prompts):
    pytest.importorskip("nixl")
    checkpoint = compressed(small, latent_dtype="bf16", **SETTINGS)
    layers = RecalkvConfig.from_hf_config(read_hf_config(checkpoint)).layers
    assert len({layer.rank for layer in layers}) > 1  # pages of several sizes
    job = small_prompts.job(checkpoint, attention_backend="recalkv")
    (alone,) = run_engines(job)
    given = {"engine": job["engine"], "prompts": small_prompts.ids, "sampling": GREEDY}
    done = subprocess.run(
        [sys.executable, SCRIPT],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    decoded = json.loads(done.stdout)
    assert decoded["tokens"] == alone["tokens"][0]
    prompted = sum(map(len, small_prompts.ids))
    assert decoded["metrics"]["vllm:external_prefix_cache_hits"] == prompted
