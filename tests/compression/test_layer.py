"""Orders of heads."""

import torch

from recalkv_vllm.compression.layer import natural_rows, reorder_rows


def test_orders_invert():
    rows = torch.arange(12)
    order = (2, 0, 3, 1)
    assert torch.equal(natural_rows(reorder_rows(rows, order), order), rows)
