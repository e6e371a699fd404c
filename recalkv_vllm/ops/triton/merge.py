"""From the partial results of split-KV decoding to the launch that merges them."""

from __future__ import annotations

import torch
import triton

from recalkv_vllm.kernels.columns import next_power_of_2
from recalkv_vllm.kernels.merge import merge_splits
from recalkv_vllm.kernels.splits import MAX_SPLITS
from recalkv_vllm.ops.triton.launch import Launch


def merge_launch(
    partial: torch.Tensor, partial_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> Launch:
    """The launch of ``merge.py``: ``partial: [splits, tokens, h_q, w_v]`` into ``out``."""
    splits, tokens, num_heads, v_width = partial.shape
    columns = min(512, next_power_of_2(v_width))
    return Launch(
        merge_splits,
        (tokens * num_heads, triton.cdiv(v_width, columns)),
        {
            "partial": partial,
            "partial_lse": partial_lse,
            "out": out,
            "lse": lse,
            "num_splits": splits,
            "stride_split": partial.stride(0),
            "stride_lse_split": partial_lse.stride(0),
            "V_WIDTH": v_width,
            "COLUMNS": columns,
            "MAX_SPLITS": MAX_SPLITS,
        },
        warps=1 if columns <= 128 else 4,
    )
