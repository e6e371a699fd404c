"""vLLM's FlashAttention in plain torch, for machines without a GPU."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.ops.merge_attn_states import _merge_attn_states_torch

from recalkv_vllm.serving.attention.flash_attention import FlashAttention


def attend_in_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, fa_version: int = 2, **given: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """``flash_attn_varlen_func``: masks are aligned to the bottom right; FlashAttention 2 says that
    a row saw nothing by plus infinity, 3 by minus infinity."""
    tokens, num_heads, _ = q.shape
    out, lse = torch.zeros_like(q), q.new_full((num_heads, tokens), torch.inf, dtype=torch.float32)
    if fa_version > 2:
        lse = -lse
    starts, cached = given["cu_seqlens_q"].tolist(), given["cu_seqlens_k"].tolist()
    left = given["window_size"][0]
    for i in range(len(starts) - 1):
        rows, columns = slice(starts[i], starts[i + 1]), slice(cached[i], cached[i + 1])
        count, length = rows.stop - rows.start, columns.stop - columns.start
        assert count <= given["max_seqlen_q"]
        assert length <= given["max_seqlen_k"]
        if not count or not length:
            continue
        keys, values = (
            x[columns].double().repeat_interleave(num_heads // x.shape[1], dim=1) for x in (k, v)
        )
        logits = torch.einsum("qhd,nhd->hqn", q[rows].double(), keys) * given["softmax_scale"]
        if given["softcap"]:
            logits = given["softcap"] * torch.tanh(logits / given["softcap"])
        distance = torch.arange(length - count, length)[:, None] - torch.arange(length)[None]
        hidden = distance < 0 if given["causal"] else torch.zeros_like(distance, dtype=torch.bool)
        if left >= 0:
            hidden = hidden | (distance > left)
        logits = logits.masked_fill(hidden, -torch.inf)
        out[rows] = torch.einsum("hqn,nhd->qhd", logits.softmax(-1), values).to(out.dtype)
        lse[:, rows] = logits.logsumexp(-1).float()
    return out, lse


def flash(version: int) -> FlashAttention:
    """That version of it."""

    def attend(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return attend_in_torch(**given, fa_version=version)

    return FlashAttention(attend, _merge_attn_states_torch)
