"""The cold tier in vLLM: an engine restores what another stored, and computes what is damaged."""

import random

import pytest

from tests.e2e.conftest import run_engines
from tests.e2e.test_features import connector

#: Of a prompt, of a page, and prompts enough to fit a predictor to.
TOKENS, BLOCK_SIZE, PROMPTS = 300, 32, 32
CHUNKS = PROMPTS * (TOKENS // BLOCK_SIZE)

pytestmark = pytest.mark.slow


def test_files_are_restored_and_damaged_ones_computed(bands, small, small_prompts, tmp_path):
    extra = {
        "spec_name": "ColdTierSpec",
        "spec_module_path": "recalkv_vllm.serving.cold_tier.spec",
        "cpu_bytes_to_use": 64 << 20,
        "root_dir": str(tmp_path),
    }
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 300) for _ in range(TOKENS)] for _ in range(PROMPTS)]
    batch = {"prompts": prompts, "sampling": {"max_tokens": 8, "ignore_eos": True}}

    def run(*batches):
        job = small_prompts.job(
            bands(small),
            *batches,
            block_size=BLOCK_SIZE,
            enable_prefix_caching=False,
            kv_transfer_config=connector("OffloadingConnector", **extra),
        )
        return run_engines(job)[0]

    stored = run(batch, {"until_files": [str(tmp_path), CHUNKS]})
    files = sorted(tmp_path.rglob("*.bin"))
    assert len([*tmp_path.rglob("predictor-*.npz")]) == 1
    latent_bytes = stored["metrics"]["vllm:kv_offload_store_bytes"]
    # A random model's columns are hardly correlated.
    assert sum(path.stat().st_size for path in files) < latent_bytes / 1.05
    # A wrong byte or one byte less, in one of the nine files of a few prompts.
    damaged = files[::40]
    for i, path in enumerate(damaged):
        contents = bytearray(path.read_bytes())
        contents[-1 - i] ^= 1
        path.write_bytes(contents[:-1] if i % 2 else contents)

    restored = run(batch)
    assert restored["tokens"][0] == stored["tokens"][0]
    hits = restored["metrics"]["vllm:external_prefix_cache_hits"]
    assert CHUNKS * BLOCK_SIZE * 0.5 < hits < CHUNKS * BLOCK_SIZE
