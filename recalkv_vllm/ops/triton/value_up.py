"""From value latents, or partial results of them, to the launch that projects them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from recalkv_vllm.kernels import heuristics
from recalkv_vllm.kernels.splits import MAX_SPLITS
from recalkv_vllm.kernels.value_up import project_values
from recalkv_vllm.ops.triton.launch import Launch


class Values(NamedTuple):
    """How value latents become head outputs; all contiguous.

    Args:
        up: ``[h_kv, d, v_width]``.
        bias: ``[h_kv, d]``.
        sinks: ``[h_q]``.
    """

    up: torch.Tensor
    bias: torch.Tensor | None
    sinks: torch.Tensor | None = None


def value_up_launch(
    o_lat: torch.Tensor,
    values: Values,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
) -> Launch:
    """The launch of ``value_up.py``, for at least one token.

    Args:
        o_lat: ``[tokens, h_q, v_width]``, or partial results with splits in front.
        out: ``[tokens, h_q, d]``.
        lse: ``[tokens, h_q]``, with splits in front as ``o_lat``; without it sinks take nothing.
    """
    sinks = None if lse is None else values.sinks
    if lse is not None and o_lat.dim() == 3:
        # A whole result is one split, to what sinks are compared with.
        o_lat, lse = (o_lat, None) if sinks is None else (o_lat[None], lse[None])
    num_kv_heads, head_dim, v_width = values.up.shape
    if o_lat.stride(-1) != 1:
        o_lat = o_lat.contiguous()
    tokens, num_heads, _ = out.shape
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
            "partial_lse": lse,
            "v_up": values.up,
            "v_bias": values.bias,
            "sinks": sinks,
            "out": out,
            "tokens": tokens,
            "num_splits": 1 if lse is None else len(lse),
            "stride_split": 0 if lse is None else o_lat.stride(0),
            "stride_lse_split": 0 if lse is None else lse.stride(0),
            "stride_token": o_lat.stride(-3),
            "stride_head": o_lat.stride(-2),
            "stride_out_token": out.stride(0),
            "stride_out_head": out.stride(1),
            "QUERIES_PER_KV": per_kv,
            "HEAD_DIM": head_dim,
            "V_WIDTH": v_width,
            "ROWS": config.rows,
            "COLUMNS": config.columns,
            "DEPTH": config.depth,
            "MAX_SPLITS": MAX_SPLITS,
            "STAGES": config.stages,
        },
        warps=config.warps,
        stages=config.stages,
    )
