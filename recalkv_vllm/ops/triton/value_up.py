"""From the arguments of ``value_up`` to a launch."""

from __future__ import annotations

import torch
import triton

from recalkv_vllm.kernels import heuristics
from recalkv_vllm.kernels.value_up import project_values
from recalkv_vllm.ops.triton.launch import Launch


def value_up_launch(
    o_lat: torch.Tensor, v_up: torch.Tensor, v_bias: torch.Tensor | None, out: torch.Tensor
) -> Launch:
    """The launch of ``value_up.py``; at least one token, contiguous factors and bias."""
    num_kv_heads, head_dim, v_width = v_up.shape
    if o_lat.stride(-1) != 1:
        o_lat = o_lat.contiguous()
    tokens, num_heads, _ = o_lat.shape
    per_kv = num_heads // num_kv_heads
    config = heuristics.value_up_config(tokens * per_kv, head_dim, v_width)
    return Launch(
        project_values,
        (
            num_kv_heads,
            triton.cdiv(tokens * per_kv, config.rows),
            triton.cdiv(head_dim, config.columns),
        ),
        {
            "o_lat": o_lat,
            "v_up": v_up,
            "v_bias": v_bias,
            "out": out,
            "tokens": tokens,
            "stride_token": o_lat.stride(0),
            "stride_head": o_lat.stride(1),
            "stride_out_token": out.stride(0),
            "stride_out_head": out.stride(1),
            "QUERIES_PER_KV": per_kv,
            "HEAD_DIM": head_dim,
            "V_WIDTH": v_width,
            "ROWS": config.rows,
            "COLUMNS": config.columns,
            "DEPTH": config.depth,
            "STAGES": config.stages,
        },
        warps=config.warps,
        stages=config.stages,
    )
