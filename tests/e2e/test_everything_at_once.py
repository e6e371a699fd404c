"""All that an engine can be asked for, at once: each request gets the tokens of a quiet engine."""

import random

import pytest

from tests.e2e.architectures import SIZES
from tests.e2e.conftest import run_engines
from tests.e2e.host_offloading import EXTRA_CONFIG as HOST_OFFLOADING
from tests.e2e.test_features import ADAPTED, SCHEMA, save_adapter

GREEDY = {"max_tokens": 24, "ignore_eos": True}
#: Three blocks of 32 tokens.
SHARED_PREFIX = 96


@pytest.mark.slow
def test_everything_at_once(small, compressed, small_prompts, tmp_path):
    """Few blocks: requests of one prefix are preempted, and come back from a host's memory."""
    draw = random.Random(5)
    prefix = [draw.randrange(3, SIZES["vocab_size"]) for _ in range(SHARED_PREFIX)]
    repeating = [prefix + [draw.randrange(3, SIZES["vocab_size"])] * 40 for _ in range(2)]
    prompts = [*small_prompts.ids, *repeating, *(prefix + ids for ids in small_prompts.ids[1:])]
    sampling = [GREEDY] * (len(prompts) - 1) + [{"max_tokens": 40, "json_schema": SCHEMA}]
    adapter = save_adapter(tmp_path / "adapter", ADAPTED)
    lora = [str(adapter) if i % 3 == 1 else None for i in range(len(prompts))]
    batch = {"prompts": prompts, "sampling": sampling, "lora": lora}
    # A place for a second adapter: vLLM 0.32 on a CPU gives requests without one the last place's.
    adapters = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    shared = {"attention_backend": "recalkv", **adapters}
    everything = {
        "enable_prefix_caching": True,
        "num_gpu_blocks_override": 20,
        "max_model_len": 352,
        "max_num_seqs": 16,
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
        },
        "kv_transfer_config": {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": HOST_OFFLOADING,
        },
    }
    quiet = {"enable_prefix_caching": False, "max_num_batched_tokens": 2048}
    checkpoint = compressed(small, k_group_size=1)
    alone, together = (
        run_engines(small_prompts.job(checkpoint, batch, batch, **shared, **options))[0]
        for options in (quiet, everything)
    )
    assert together["tokens"][0] == alone["tokens"][0] == alone["tokens"][1]
    assert together["tokens"][1] == alone["tokens"][1]
    for happened in (
        "num_preemptions",
        "prefix_cache_hits",
        "external_prefix_cache_hits",
        "spec_decode_num_accepted_tokens",
    ):
        assert together["metrics"][f"vllm:{happened}"] > 0, happened
    assert "{" in together["outputs"][0][-1]["text"]
