"""What a layer fixes once its weights are loaded, and what a caller knows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recalkv_vllm.latent_format import LatentFormat

Span = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentLayer:
    """Constants of ``paged_latent_attention``, documented at the reference's function.

    Kernels pack them when they bind a layer; later changes of the tensors are not seen.
    """

    k_up: torch.Tensor
    k_spans: Sequence[Span]
    v_spans: Sequence[Span]
    head_dim: int
    scale: float
    cos_sin_cache: torch.Tensor | None = None
    is_neox: bool = True
    k_bias: torch.Tensor | None = None
    k_norm_weight: torch.Tensor | None = None
    k_norm_eps: float = 1e-6
    sliding_window: int | None = None
    soft_cap: float | None = None
    latent_format: LatentFormat | None = None

    @property
    def k_group_size(self) -> int:
        return self.k_up.shape[1] // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        return self.k_up.shape[0] * self.k_group_size

    @property
    def k_width(self) -> int:
        return self.k_up.shape[2]

    @property
    def v_width(self) -> int:
        return self.v_spans[0][1] - self.v_spans[0][0]

    @property
    def rot_dim(self) -> int:
        """Columns of a head that RoPE turns."""
        return 0 if self.cos_sin_cache is None else self.cos_sin_cache.shape[1]


@dataclass(frozen=True, slots=True)
class BatchHints:
    """What the host knows of a batch without asking the device; it only makes calls faster.

    Args:
        num_decodes: this many first sequences have few queries each and
        num_decode_tokens: own exactly this many first rows of ``q``,
        max_decode_query_len: at most this many each.
        max_seq_len: bound on ``seq_lens``; what the block table can hold if not given.
    """

    num_decodes: int = 0
    num_decode_tokens: int = 0
    max_decode_query_len: int = 1
    max_seq_len: int | None = None


NO_HINTS = BatchHints()
