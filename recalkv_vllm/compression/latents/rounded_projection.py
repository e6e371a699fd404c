"""Keys and values out of quantized latents, in a model of ``transformers``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from recalkv_vllm.band_format import CacheFormat
from recalkv_vllm.compression.base_model.attention import Attention
from recalkv_vllm.compression.layer import LayerFactors
from recalkv_vllm.span import Span


class RoundedProjection(nn.Module):
    """Keys or values out of latents that went through the cache.

    Args:
        latent_format: how latents are stored.
        down: ``[rank, H]``.
        up: ``[h_kv, d, width]``.
        spans: of each head.
        bias: ``[h_kv · d]`` or None.
    """

    down: torch.Tensor
    up: torch.Tensor

    def __init__(
        self,
        latent_format: CacheFormat,
        down: torch.Tensor,
        up: torch.Tensor,
        spans: Sequence[Span],
        bias: torch.Tensor | None,
    ):
        super().__init__()
        self.latent_format, self.spans, self.bias = latent_format, spans, bias
        self.register_buffer("down", down)
        self.register_buffer("up", up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.latent_format.round_trip(x @ self.down.T)
        heads = [
            z[..., start:end] @ up.T for up, (start, end) in zip(self.up, self.spans, strict=True)
        ]
        out = torch.cat(heads, dim=-1)
        return out if self.bias is None else out + self.bias


def rounded_projections(
    factors: LayerFactors,
    latent_format: CacheFormat,
    head_order: Sequence[int],
    attention: Attention,
) -> tuple[RoundedProjection, RoundedProjection]:
    """What stands in for an attention's key and value projections when its latents are stored.

    Args:
        factors: of the layer.
        latent_format: how latents are stored.
        head_order: which of the factors' heads is each of the attention's.
        attention: gives biases, device and dtype.
    """
    layout, like = factors.layout, attention.o_proj.weight
    down, heads = factors.down.to(like), factors.v_up.shape[0]

    def rounded(up: torch.Tensor, spans: Sequence[Span], bias: torch.Tensor) -> RoundedProjection:
        per_head = [spans[head * len(spans) // heads] for head in head_order]
        return RoundedProjection(latent_format, down, up[list(head_order)].to(like), per_head, bias)

    k_up = factors.k_up.unflatten(1, (layout.k_group_size, -1)).flatten(0, 1)
    return (
        rounded(k_up, layout.k_spans, attention.k_proj.bias),
        rounded(factors.v_up, layout.v_spans, attention.v_proj.bias),
    )
