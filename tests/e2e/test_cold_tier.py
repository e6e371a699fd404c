"""The cold tier in vLLM: what one engine stored, another restores; damaged files are computed."""

import random

import pytest

from tests.e2e.conftest import run_engines
from tests.e2e.test_features import connector

#: Of a prompt, and so many prompts that a predictor is fitted; of a page.
TOKENS, PROMPTS, BLOCK_SIZE = 300, 32, 32
CHUNKS = PROMPTS * (TOKENS // BLOCK_SIZE)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(bands, small, small_prompts, tmp_path_factory):
    """Results of a first engine, of a second one, and of a third whose files are damaged; and the
    folder of the files."""
    folder = tmp_path_factory.mktemp("cold")
    extra = {
        "spec_name": "ColdTierSpec",
        "spec_module_path": "recalkv_vllm.serving.cold_tier.spec",
        "cpu_bytes_to_use": 64 << 20,
        "root_dir": str(folder),
    }
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 300) for _ in range(TOKENS)] for _ in range(PROMPTS)]
    batch = {"prompts": prompts, "sampling": {"max_tokens": 8, "ignore_eos": True}}

    def job(*batches):
        return small_prompts.job(
            bands(small),
            *batches,
            block_size=BLOCK_SIZE,
            enable_prefix_caching=False,
            kv_transfer_config=connector("OffloadingConnector", **extra),
        )

    first, second = run_engines(
        job(batch, {"until_files": [str(folder), CHUNKS]}), job(batch)
    )
    sizes = [path.stat().st_size for path in folder.rglob("*.bin")]
    for i, path in enumerate(sorted(folder.rglob("*.bin"))):
        contents = bytearray(path.read_bytes())
        contents[-1 - i] ^= 1
        path.write_bytes(contents[:-1] if i % 2 else contents)
    (third,) = run_engines(job(batch))
    return first, second, third, folder, sizes


def test_latents_are_restored_from_files(served):
    first, second, _, folder, _ = served
    assert len([*folder.rglob("predictor-*.npz")]) == 1
    assert first["metrics"]["vllm:external_prefix_cache_hits"] == 0
    assert second["metrics"]["vllm:external_prefix_cache_hits"] == CHUNKS * BLOCK_SIZE
    assert second["tokens"][0] == first["tokens"][0]


def test_files_are_smaller_than_latents(served):
    first, *_, sizes = served
    stored = first["metrics"]["vllm:kv_offload_store_bytes"]
    # A random model's columns are hardly correlated.
    assert sum(sizes) < stored / 1.05


def test_damaged_files_are_computed_again(served):
    first, _, third, *_ = served
    assert third["tokens"][0] == first["tokens"][0]
