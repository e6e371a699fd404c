"""What vLLM's offloading is told, and copies on the host."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

from recalkv_vllm.serving.cold_tier.host_worker import HostWorker
from recalkv_vllm.serving.cold_tier.served_layout import KEY, served_layout
from recalkv_vllm.serving.cold_tier.spec import ColdTierSpec
from tests.serving.cold_tier.chunks import BANDS, layout

#: Bytes of each layer's page, and of all.
PAGES = [layer.block_size * layer.latents.slot_bytes(96) for layer in layout().layers]
BLOCK_BYTES = sum(PAGES)


def offloading(ranks=1, blocks=2, block_bytes=BLOCK_BYTES, groups=1, kv_cache_layout="LBNHC"):
    bands = [[[*map(list, of_layer)], 0] for of_layer in BANDS]
    config = SimpleNamespace(
        groups=[SimpleNamespace(tokens_per_block=8)] * groups,
        cache=SimpleNamespace(blocks_per_chunk=blocks),
        worker_kv_bytes_per_block=block_bytes,
        kv_cache_layout=kv_cache_layout,
        canonical_layout=False,
    )
    return SimpleNamespace(extra_config={KEY: {"ranks": [bands] * ranks}}, config=config)


def test_pages_of_layers_lie_one_after_the_other():
    of = layout()
    assert served_layout(offloading(), of.size) == of


def test_pages_of_ranks_and_of_blocks():
    """No two share a byte, and together they are all of a chunk, in either layout."""
    for name in "LBNHC", "BLNHC":
        size = 2 * 3 * BLOCK_BYTES
        of = served_layout(offloading(ranks=2, blocks=3, kv_cache_layout=name), size)
        used = np.zeros(size, int)
        for layer, page in zip(of.layers, PAGES * 2, strict=True):
            for start in layer.starts:
                used[start : start + page] += 1
        assert (used == 1).all()
        assert [layer.lowest for layer in of.layers] == [True, False, False] * 2
    # In a block's pages, layers follow one another.
    assert of.layers[1].starts == tuple(PAGES[0] + i * BLOCK_BYTES for i in range(3))


@pytest.mark.parametrize("wrong", [{"block_bytes": BLOCK_BYTES + 8}, {"groups": 2}, {"ranks": 0}])
def test_what_is_not_known_is_not_guessed(wrong):
    assert served_layout(offloading(**wrong), layout().size) is None


def test_the_tier_is_beside_others_that_were_asked_for():
    given = {"root_dir": "/cold", "secondary_tiers": [{"type": "example"}], "cpu_bytes_to_use": 1}
    names = ColdTierSpec.build_metric_definitions(given)
    assert "recalkv:cold_tier_file_bytes" in names
    assert len(given["secondary_tiers"]) == 1


def test_host_copies_come_back():
    """Blocks that start and end inside a chunk, two tensors, of which one has padded pages."""
    generator = torch.Generator().manual_seed(0)
    caches = [
        torch.randint(-128, 128, (20, width), generator=generator, dtype=torch.int8)
        for width in (24, 40)
    ]
    views = []

    def view(page_bytes):
        views.append(torch.full((9, page_bytes), 99, dtype=torch.int8))
        return views[-1]

    region = SimpleNamespace(create_next_worker_view=view, cleanup=lambda: None)
    refs = [CanonicalKVCacheRef(0, 24), CanonicalKVCacheRef(1, 37)]
    tensors = [CanonicalKVCacheTensor(cache, cache.shape[1]) for cache in caches]
    worker = HostWorker(CanonicalKVCaches(tensors, [refs]), region, blocks_per_chunk=3)
    stored, chunks = [4, 9, 1, 7, 12], CPULoadStoreSpec([5, 2, 8])
    # The first is the third of its chunk.
    worker.submit_store(1, GPULoadStoreSpec(stored, [5], [2]), chunks)
    before = [cache.clone() for cache in caches]
    restored = [0, 2, 3, 5, 6]
    worker.submit_load(2, chunks, GPULoadStoreSpec(restored, [5], [2]))
    for cache, was, size in zip(caches, before, (24, 37), strict=True):
        assert cache[restored, :size].equal(was[stored, :size])
        assert cache[:, size:].equal(was[:, size:])
        others = [i for i in range(20) if i not in restored]
        assert cache[others].equal(was[others])
    assert [one.job_id for one in worker.get_finished()] == [1, 2]
    assert worker.get_finished() == []
    assert views[0][5, :48].eq(99).all()
