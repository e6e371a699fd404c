"""The compressed model in training: the dense one with other attention projections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from recalkv_vllm.band_format import CacheFormat
from recalkv_vllm.compression.base_model.attention import Attention, CausalLM, attention_modules
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
        z = factors.latents(x)
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


@dataclass(frozen=True, slots=True)
class StudentLayer:
    """One layer: its ``dense`` projections, and ``trained`` ones to put in their places."""

    attention: Attention
    factors: TrainedFactors
    dense: dict[str, nn.Module]
    trained: dict[str, nn.Module]

    def use(self, projections: dict[str, nn.Module]) -> None:
        for name, module in projections.items():
            setattr(self.attention, name, module)

    @property
    def linears(self) -> dict[str, TrainedLinear]:
        """Of the base model's own projections those that learn too."""
        return {n: part for n, part in self.trained.items() if isinstance(part, TrainedLinear)}


class Student:
    """A frozen dense model that turns into the compressed one, and back.

    Args:
        model: the dense model, on the devices where it runs.
        base: the same model in memory.
        factors: of all layers; their ``query`` and ``output`` take the place of the base model's.
        latent_formats: how each layer's latents are stored; None for plain elements.
        train_weights: whether ``q_proj`` and ``o_proj`` learn too.
    """

    def __init__(
        self,
        model: CausalLM,
        base: CausalLM,
        factors: Sequence[LayerFactors],
        latent_formats: Sequence[CacheFormat | None],
        train_weights: bool,
    ):
        self.model = model
        modules = attention_modules(model), attention_modules(base)
        self.layers = [
            _student_layer(*parts, train_weights)
            for parts in zip(*modules, factors, latent_formats, strict=True)
        ]

    @contextmanager
    def compressed(self) -> Iterator[None]:
        """The model is the compressed one in the block."""
        for layer in self.layers:
            layer.use(layer.trained)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.use(layer.dense)

    def parameters(self) -> list[nn.Parameter]:
        """What learns, in an order that is always the same."""
        return [
            parameter
            for layer in self.layers
            for part in (layer.factors, *layer.linears.values())
            for parameter in part.parameters()
        ]

    def rounded(self, factors: Sequence[LayerFactors]) -> list[LayerFactors]:
        """``factors`` with what training made of them, in their dtype, on the CPU."""
        results = []
        for before, layer in zip(factors, self.layers, strict=True):
            after = layer.factors.rounded(before)
            weights = {
                name: part.weight().detach().to("cpu", before.down.dtype)
                for name, part in layer.linears.items()
            }
            results.append(
                replace(
                    after,
                    query=weights.get("q_proj", after.query),
                    output=weights.get("o_proj", after.output),
                )
            )
        return results


def _student_layer(
    attention: Attention,
    base: Attention,
    factors: LayerFactors,
    latent_format: CacheFormat | None,
    train_weights: bool,
) -> StudentLayer:
    device = execution_device(attention.o_proj)

    def moved(bias: torch.Tensor | None) -> torch.Tensor | None:
        return None if bias is None else bias.detach().to(device)

    own = TrainedFactors(factors, latent_format, device)
    layout = factors.layout
    trained: dict[str, nn.Module] = {
        "k_proj": LatentProjection(own, own.k_up, layout.k_spans, moved(base.k_proj.bias)),
        "v_proj": LatentProjection(own, own.v_up, layout.v_spans, moved(base.v_proj.bias)),
    }
    if train_weights:
        trained["q_proj"] = TrainedLinear(factors.query, base.q_proj, device)
        trained["o_proj"] = TrainedLinear(factors.output, base.o_proj, device)
    dense = {name: getattr(attention, name) for name in trained}
    return StudentLayer(attention, own, dense, trained)


def execution_device(module: nn.Module) -> torch.device:
    """Where a module runs, also if ``accelerate`` keeps its weights elsewhere."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return torch.device(next(module.parameters()).device if device is None else device)
