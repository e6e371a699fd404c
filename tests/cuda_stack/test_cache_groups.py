"""Cache specs, groups and pages as vLLM's engine works them out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from recalkv_vllm.band_format import token_bytes
from recalkv_vllm.checkpoint import AttentionGeometry
from tests.cuda_stack.checkpoints import EVERY, WINDOW
from tests.cuda_stack.worker import CACHE_BYTES, Worker

BLOCK = 16


def own_bytes(name: str) -> list[int]:
    """Bytes of a token in each layer."""
    checkpoint = EVERY[name]
    config = checkpoint.recalkv_config()
    geometry = AttentionGeometry.from_hf_config(checkpoint.hf_config().to_dict())
    scales = geometry.key_scales()
    return [
        token_bytes(config.latent_format(i), layout.rank, 2, scales)
        for i, layout in enumerate(config.layers)
    ]


@pytest.mark.parametrize("name", ["plain", "mixed", "int4", "bands"])
def test_every_layer_has_a_page_of_its_own_size_in_one_group(
    name: str, worker: Callable[[str], Worker]
) -> None:
    served = worker(name)
    pages = [spec.page_size_bytes for spec in served.specs.values()]
    assert pages == [BLOCK * size for size in own_bytes(name)]
    assert len(served.cache.kv_cache_groups) == 1
    assert served.cache.num_blocks == CACHE_BYTES // sum(pages)


def test_layers_of_one_kind_share_a_group(worker: Callable[[str], Worker]) -> None:
    """Not a group for each rank: two layers without a window make groups of two."""
    served = worker("gemma")
    groups = served.cache.kv_cache_groups
    kinds = [type(group.kv_cache_spec) for group in groups]
    assert sorted(kinds.count(kind) for kind in (FullAttentionSpec, SlidingWindowSpec)) == [1, 5]
    assert all(len(group.layer_names) == 2 for group in groups)
    page = BLOCK * max(own_bytes("gemma"))
    assert {group.kv_cache_spec.page_size_bytes for group in groups} == {page}
    assert served.cache.num_blocks == CACHE_BYTES // (2 * page)
    windows = {getattr(spec, "sliding_window", None) for spec in served.specs.values()}
    assert windows == {WINDOW, None}


@pytest.mark.parametrize("name", EVERY)
def test_layers_get_their_cache(name: str, worker: Callable[[str], Worker]) -> None:
    for layer in worker(name).layers.values():
        blocks, heads, block, width = layer.kv_cache.shape
        assert (heads, block, width) == (1, BLOCK, layer.page_width)
        assert layer.kv_cache.device.type == "cuda"
        assert layer.kv_cache.dtype == (
            torch.bfloat16 if layer.latent_format is None else torch.uint8
        )
        assert blocks == worker(name).cache.num_blocks
