"""transformers' attention on a CPU for a token at a time, of many rows at once.

torch's kernel takes one query head after the other, and with one token each most of its time goes
into beginning. The query heads of a KV head are rows of one query here; only rounding may differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from recalkv_vllm.compression.base_model.attention import CausalLM

NAME = "recalkv_one_token"


def use_one_token_attention(model: CausalLM) -> None:
    """Let ``model`` attend by :func:`one_token_attention`, where it is on a CPU and would otherwise
    by torch's kernel."""
    on_cpu = model.get_input_embeddings().weight.device.type == "cpu"
    if on_cpu and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, one_token_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def one_token_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' ``sdpa``.

    Args:
        module: of the attention.
        query: ``[rows, h_q, tokens, d]``.
        key: ``[rows, h_kv, cached tokens, d]``.
        value: as ``key``.
        attention_mask: None if a token sees all that is cached.
        options: of ``sdpa``.

    Returns:
        ``[rows, tokens, h_q, d]``, and None for weights that are not kept.
    """
    if query.shape[2] > 1 or attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    together = query.reshape(*key.shape[:2], -1, query.shape[3])
    options["is_causal"] = False  # these rows are no sequence
    output, _ = sdpa_attention_forward(module, together, key, value, None, **options)
    return output.transpose(1, 2).reshape(len(query), 1, query.shape[1], -1), None
