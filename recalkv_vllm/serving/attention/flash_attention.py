"""vLLM's own attention over dense keys and values, where it has one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from vllm.platforms import current_platform

#: Largest heads of FlashAttention 2 and 3; heads come in multiples of 8.
LARGEST_HEAD_DIM = 256


class Logits(NamedTuple):
    """How a layer makes logits of products."""

    scale: float
    soft_cap: float | None
    window: int | None


class Partial(NamedTuple):
    """Attention over some keys: ``heads: [tokens, h_q, d]``, ``lse: [h_q, tokens]``."""

    heads: torch.Tensor
    lse: torch.Tensor


@dataclass(frozen=True, slots=True)
class FlashAttention:
    """Functions with vLLM's signatures.

    Args:
        attend: of packed sequences, ``flash_attn_varlen_func``.
        merge: of two partial results, ``merge_attn_states``.
    """

    attend: Callable[..., Any]
    merge: Callable[..., None]

    def over(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        starts: tuple[torch.Tensor, torch.Tensor],
        longest: tuple[int, int],
        logits: Logits,
        *,
        causal: bool,
    ) -> Partial:
        """Attend packed queries to packed keys.

        Args:
            q: ``[tokens, h_q, d]``.
            keys: ``[cached tokens, h_kv, d]``.
            values: the same.
            starts: of sequences in queries and in keys.
            longest: sequence of queries, and of keys.
            causal: the last query of a sequence sees its last key, the one before the one before.
        """
        windows = [-1, -1] if logits.window is None else [logits.window - 1, 0]
        heads, lse = self.attend(
            q=q,
            k=keys,
            v=values,
            cu_seqlens_q=starts[0],
            cu_seqlens_k=starts[1],
            max_seqlen_q=longest[0],
            max_seqlen_k=longest[1],
            softmax_scale=logits.scale,
            causal=causal,
            window_size=windows,
            softcap=logits.soft_cap or 0.0,
            return_softmax_lse=True,
        )
        return Partial(heads, lse)

    def merged(self, newer: Partial, older: Partial) -> Partial:
        """What attention over the keys of both would have given."""
        result = Partial(torch.empty_like(newer.heads), torch.empty_like(newer.lse))
        self.merge(
            output=result.heads,
            output_lse=result.lse,
            prefix_output=older.heads,
            prefix_lse=older.lse,
            suffix_output=newer.heads,
            suffix_lse=newer.lse,
        )
        return result


def flash_attention(dtype: torch.dtype, head_dim: int, soft_cap: bool) -> FlashAttention | None:
    """vLLM's, or None where it has none for such heads: float32, other devices than CUDA's."""
    if not current_platform.is_cuda() or dtype not in (torch.bfloat16, torch.float16):
        return None
    if head_dim % 8 or head_dim > LARGEST_HEAD_DIM:
        return None
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    version = get_flash_attn_version(head_size=head_dim, requires_softcap=soft_cap)
    if version is None:
        return None
    return FlashAttention(partial(flash_attn_varlen_func, fa_version=version), merge_attn_states)
