"""Slots of several widths in pages of one size."""

import pytest
import torch

from recalkv_vllm.serving.attention.page_width import own_slots, slot_widths


@pytest.mark.parametrize(
    ("own", "windows_differ", "asked"),
    [
        ((64, 96, 80), True, (96, 96, 96)),
        ((64, 96, 80), False, (64, 96, 80)),
        ((64, 32, 64), True, (64, 32, 64)),
    ],
)
def test_widths(own, windows_differ, asked):
    assert slot_widths(own, windows_differ) == asked


def test_own_slots_are_the_start_of_a_page():
    pages = torch.arange(2 * 4 * 6).view(2, 1, 4, 6)
    slots = own_slots(pages, 3)
    assert slots.tolist() == pages.flatten(1)[:, :12].view(2, 4, 3).tolist()
    slots[1, 3, 2] = -1
    assert pages[1].flatten()[11] == -1
    assert own_slots(pages, 6).data_ptr() == pages.data_ptr()
