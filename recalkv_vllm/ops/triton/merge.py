"""From the partial results of a work list's pieces to the launch that merges them."""

from __future__ import annotations

import torch
import triton

from recalkv_vllm.kernels.columns import next_power_of_2
from recalkv_vllm.kernels.merge import merge_pieces
from recalkv_vllm.kernels.pieces import MAX_PIECES
from recalkv_vllm.ops.triton.launch import Launch
from recalkv_vllm.ops.triton.work_list import Partial


def merge_launch(partial: Partial, out: torch.Tensor, lse: torch.Tensor) -> Launch:
    """The launch of ``merge.py`` into ``out: [tokens, h_q, w_v]`` and ``lse: [tokens, h_q]``."""
    tokens, num_heads, v_width = out.shape
    columns = min(512, next_power_of_2(v_width))
    work = partial.work
    return Launch(
        merge_pieces,
        (tokens * num_heads, triton.cdiv(v_width, columns)),
        {
            "partial": partial.o_lat,
            "partial_lse": partial.lse,
            "query_start_loc": work.query_start_loc,
            "first_piece": work.first_piece,
            "out": out,
            "lse": lse,
            "num_seqs": work.num_seqs,
            "first_token": work.first_token,
            "num_heads": num_heads,
            "per_kv": work.cut.per_kv,
            "rows": work.cut.rows,
            "V_WIDTH": v_width,
            "COLUMNS": columns,
            "MAX_PIECES": MAX_PIECES,
        },
        warps=1 if columns <= 128 else 4,
    )
