"""KV connectors by name and by what they are told to do."""

from types import SimpleNamespace

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.canonical_mapping import (
    derive_canonical_mappings,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec

from recalkv_vllm.serving.startup.connectors import unsupported_connector


@pytest.mark.parametrize(
    ("name", "extra_config", "on_gpu"),
    [
        ("ExampleConnector", {}, False),
        ("OffloadingConnector", {"cpu_bytes_to_use": 1, "canonical_layout": True}, True),
        ("MultiConnector", {"connectors": [{"kv_connector": "ExampleConnector"}]}, False),
        ("OffloadingConnector", {"spec_name": "Own", "spec_module_path": "own"}, False),
        ("OffloadingConnector", {"spec_name": "ColdTierSpec", "root_dir": "/cold"}, False),
        ("NixlConnector", {}, True),
    ],
)
def test_accepted(name, extra_config, on_gpu):
    assert unsupported_connector(name, extra_config, on_gpu, ranks=1) is None


@pytest.mark.parametrize(
    ("name", "extra_config", "on_gpu", "message"),
    [
        ("SimpleCPUOffloadConnector", {}, True,
         "expected ExampleConnector or ExampleHiddenStatesConnector or OffloadingConnector or "
         "NixlConnector or MultiConnector, found SimpleCPUOffloadConnector"),
        ("MultiConnector", {"connectors": [{"kv_connector": "OffloadingConnector"}]}, False,
         "MultiConnector: OffloadingConnector: vLLM offloads from GPUs only, found a CPU"),
        ("OffloadingConnector", {}, False, "OffloadingConnector: vLLM offloads from GPUs only, "
         "found a CPU"),
        ("OffloadingConnector", {"spec_name": "TieringOffloadingSpec"}, True,
         "spec_name: expected CPUOffloadingSpec or ColdTierSpec, found TieringOffloadingSpec"),
        ("OffloadingConnector", {"spec_name": "ColdTierSpec"}, True,
         "ColdTierSpec: expected root_dir, the folder of its files, found none"),
        ("NixlConnector", {}, True, "NixlConnector: expected an engine of one rank, found 2"),
    ],
)  # fmt: skip
def test_refused(name, extra_config, on_gpu, message):
    assert unsupported_connector(name, extra_config, on_gpu, ranks=2) == message


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_canonical_pages_hold_what_every_rank_caches(tp_size):
    """vLLM's offloading may store pages of all ranks as one: each gets its own bytes back."""
    spec = FullAttentionSpec(
        block_size=16, num_kv_heads=1, head_size=24, head_size_v=24, dtype=torch.bfloat16,
        max_tp_shards=1,
    )  # fmt: skip
    groups = [SimpleNamespace(layer_names=["layer"], kv_cache_spec=spec)]
    page_bytes = 16 * 48 * 2
    pages = torch.randint(256, (tp_size, page_bytes), dtype=torch.uint8)
    if tp_size > 4:
        pages[1::2] = pages[::2]  # two ranks to each of four KV heads
    mappings = []
    for rank in range(tp_size):
        parallel = SimpleNamespace(
            tensor_parallel_size=tp_size, prefill_context_parallel_size=1, world_size=tp_size,
            decode_context_parallel_size=1, cp_kv_cache_interleave_size=1, rank=rank,
        )  # fmt: skip
        heads = SimpleNamespace(get_total_num_kv_heads=lambda: 4)
        cache = torch.zeros(2, 1, 16, 48, dtype=torch.bfloat16)
        mappings += derive_canonical_mappings(
            SimpleNamespace(parallel_config=parallel, model_config=heads),
            SimpleNamespace(num_blocks=2, kv_cache_groups=groups),
            {"layer": cache},
        ).values()
    canonical = torch.zeros(mappings[0].canonical_page_size_bytes, dtype=torch.uint8)
    for page, mapping in zip(pages, mappings, strict=True):
        if mapping.is_writer(0):
            for there, here in moves(mapping):
                canonical[there] = page[here]
    for page, mapping in zip(pages, mappings, strict=True):
        read = torch.zeros_like(page)
        for there, here in moves(mapping):
            read[here] = canonical[there]
        assert read.equal(page)


def moves(mapping):
    """Slices of a canonical page, and of a rank's own."""
    for run in mapping.runs:
        for i in range(run.num_fragments):
            there = run.canonical_offset + i * run.canonical_stride
            here = run.local_offset + i * run.local_stride
            yield slice(there, there + run.fragment_size), slice(here, here + run.fragment_size)
