"""Attention projections that learn: a layer's factors, and ``q_proj`` and ``o_proj``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from recalkv_vllm.band_format import CacheFormat
from recalkv_vllm.compression.layer import LayerFactors, natural_order
from recalkv_vllm.span import Span


class Scaled(nn.Module):
    """A float32 tensor that learns, as a parameter of unit size times what it was sized at first.

    Factors balance the singular values between ``down`` and ``up``, so that entries of one layer
    may be ten thousand times those of another; steps of one size would do nothing here and wreck
    the layer there.

    Args:
        tensor: to start from.
        device: where it learns.
        dims: that share a size.
    """

    def __init__(self, tensor: torch.Tensor, device: torch.device, dims: tuple[int, ...]):
        super().__init__()
        tensor = tensor.detach().to(device, torch.float32)
        size = tensor.square().mean(dims, keepdim=True).sqrt()
        self._size = torch.where(size == 0, 1.0, size)
        self.unit = nn.Parameter(tensor / self._size)

    def forward(self) -> torch.Tensor:
        return self.unit * self._size


class TrainedFactors(nn.Module):
    """A layer's factors, shared by its key and its value projection.

    Args:
        factors: what training starts from.
        latent_format: how latents are stored; None for plain elements.
        device: where the layer runs.
    """

    def __init__(
        self, factors: LayerFactors, latent_format: CacheFormat | None, device: torch.device
    ):
        super().__init__()
        self.layout, self.latent_format = factors.layout, latent_format
        self.down = Scaled(factors.down, device, dims=(1,))
        self.k_up = Scaled(factors.k_up, device, dims=(1,))
        #: By V group, as keys are by K group: ``[G_v, h_kv / G_v · d, v_width]``.
        v_up = factors.v_up.unflatten(0, (len(factors.layout.v_spans), -1)).flatten(1, 2)
        self.v_up = Scaled(v_up, device, dims=(1,))
        #: Input and latents of the key projection, until the value projection takes them.
        self._shared: tuple[torch.Tensor, torch.Tensor] | None = None

    def shared_latents(self, x: torch.Tensor) -> torch.Tensor:
        """:meth:`latents`, computed once for two calls in a row with the same tensor.

        All architectures feed the key and the value projection of a layer the same tensor, one
        after the other. Nothing is held in between passes.
        """
        shared, self._shared = self._shared, None
        if shared is not None and shared[0] is x:
            return shared[1]
        z = self.latents(x)
        self._shared = x, z
        return z

    def latents(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., rank]`` as the cache gives them back; gradients pass rounding as if it were none.

        (The straight-through estimator, arXiv 1308.3432.)
        """
        z = F.linear(x, self.down())
        if self.latent_format is None:
            return z
        return z + (self.latent_format.round_trip(z.detach()) - z.detach())

    def rounded(self, factors: LayerFactors) -> LayerFactors:
        """``factors`` with what training made of them, in their dtype."""
        v_up = self.v_up().unflatten(1, (-1, factors.v_up.shape[1])).flatten(0, 1)
        down, k_up, v_up = (
            part.detach().to("cpu", factors.down.dtype) for part in (self.down(), self.k_up(), v_up)
        )
        return replace(factors, down=down, k_up=k_up, v_up=v_up)


class LatentProjection(nn.Module):
    """Keys or values ``[..., h_kv · d]`` out of latents, heads in natural order.

    Args:
        factors: whose latents.
        ups: ``[groups, heads of a group · d, width]``, one of them.
        spans: of the groups.
        bias: ``[h_kv · d]`` in natural order, or None.
    """

    def __init__(
        self,
        factors: TrainedFactors,
        ups: Scaled,
        spans: Sequence[Span],
        bias: torch.Tensor | None,
    ):
        super().__init__()
        # In a tuple: parameters are the factors' alone.
        self._of = factors, ups
        self._spans, self._bias = spans, bias
        self._natural = natural_order(factors.layout.head_order)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factors, ups = self._of
        z = factors.shared_latents(x)
        groups = [
            F.linear(z[..., span.start : span.end], up)
            for up, span in zip(ups(), self._spans, strict=True)
        ]
        heads = torch.cat(groups, dim=-1).unflatten(-1, (len(self._natural), -1))
        out = heads[..., self._natural, :].flatten(-2)
        return out if self._bias is None else out + self._bias.to(out.dtype)


class TrainedLinear(nn.Module):
    """A projection whose weight learns, and whose bias does not.

    Args:
        weight: to start from; None for the base model's.
        linear: the base model's projection.
        device: where it runs.
    """

    def __init__(self, weight: torch.Tensor | None, linear: nn.Linear, device: torch.device):
        super().__init__()
        self.weight = Scaled(linear.weight if weight is None else weight, device, dims=(0, 1))
        self._bias = None if linear.bias is None else linear.bias.detach().to(device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight(), self._bias)
