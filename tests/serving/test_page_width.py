"""Slots of several widths in pages of one size."""

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from recalkv_vllm.serving.attention.backend import RecalkvBackend, with_pages
from recalkv_vllm.serving.attention.page_width import own_slots, slot_widths


@pytest.mark.parametrize(
    ("own", "kinds_differ", "asked"),
    [
        ((64, 96, 80), True, (96, 96, 96)),
        ((64, 96, 80), False, (64, 96, 80)),
        ((64, 32, 64), True, (64, 32, 64)),
    ],
)
def test_widths(own, kinds_differ, asked):
    assert slot_widths(own, kinds_differ) == asked


def test_beside_layers_without_attention_all_widths_are_one():
    assert slot_widths((64, 32, 64), True, hybrid=True) == (64, 64, 64)


@pytest.mark.parametrize(
    ("width", "dtype", "token_bytes"), [(40, torch.float32, 160), (101, torch.uint8, 101)]
)
def test_vllm_is_told_the_size_of_a_latent_page(width, dtype, token_bytes):
    """When it makes the pages of layers without attention as large."""
    dense = FullAttentionSpec(block_size=16, num_kv_heads=8, head_size=64, dtype=torch.bfloat16)
    backend = with_pages(width, dtype)
    assert backend.customize_spec(dense).page_size_bytes == 16 * token_bytes
    assert backend.get_name() == RecalkvBackend.get_name()
    assert with_pages(width, dtype) is backend


def test_own_slots_are_the_start_of_a_page():
    pages = torch.arange(2 * 4 * 6).view(2, 1, 4, 6)
    slots = own_slots(pages, 3)
    assert slots.tolist() == pages.flatten(1)[:, :12].view(2, 4, 3).tolist()
    slots[1, 3, 2] = -1
    assert pages[1].flatten()[11] == -1
    assert own_slots(pages, 6).data_ptr() == pages.data_ptr()
