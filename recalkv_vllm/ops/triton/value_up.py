"""From value latents, or partial results of them, to the launch that projects them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from recalkv_vllm.kernels import heuristics
from recalkv_vllm.kernels.pieces import MAX_PIECES
from recalkv_vllm.kernels.value_up import project_values
from recalkv_vllm.ops.triton.launch import Launch
from recalkv_vllm.ops.triton.work_list import Partial


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
        o_lat: ``[tokens, h_q, v_width]``.
        out: ``[tokens, h_q, d]``.
        lse: ``[tokens, h_q]``; without it sinks take nothing.
    """
    if o_lat.stride(-1) != 1:
        o_lat = o_lat.contiguous()
    sinks = None if lse is None else values.sinks
    arguments: dict[str, Any] = {
        "o_lat": o_lat,
        "lse": None if sinks is None else lse,
        "sinks": sinks,
        "query_start_loc": None,
        "first_piece": None,
        "num_seqs": 0,
        "first_token": 0,
        "block_rows": 0,
        "stride_token": o_lat.stride(0),
        "stride_head": o_lat.stride(1),
    }
    return _launch(arguments, values, out)


def merged_value_up_launch(partial: Partial, values: Values, out: torch.Tensor) -> Launch:
    """The same for the partial results of a work list, which it merges."""
    work = partial.work
    arguments: dict[str, Any] = {
        "o_lat": partial.o_lat,
        "lse": partial.lse,
        "sinks": values.sinks,
        "query_start_loc": work.query_start_loc,
        "first_piece": work.first_piece,
        "num_seqs": work.num_seqs,
        "first_token": work.first_token,
        "block_rows": work.cut.rows,
        "stride_token": 0,
        "stride_head": 0,
    }
    return _launch(arguments, values, out)


def _launch(arguments: dict[str, Any], values: Values, out: torch.Tensor) -> Launch:
    num_kv_heads, head_dim, v_width = values.up.shape
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
            **arguments,
            "v_up": values.up,
            "v_bias": values.bias,
            "out": out,
            "tokens": tokens,
            "stride_out_token": out.stride(0),
            "stride_out_head": out.stride(1),
            "QUERIES_PER_KV": per_kv,
            "HEAD_DIM": head_dim,
            "V_WIDTH": v_width,
            "ROWS": config.rows,
            "COLUMNS": config.columns,
            "DEPTH": config.depth,
            "MAX_PIECES": MAX_PIECES,
            "STAGES": config.stages,
        },
        warps=config.warps,
        stages=config.stages,
    )
