"""The compressed model in training: the dense one with other attention projections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from recalkv_vllm.band_format import CacheFormat
from recalkv_vllm.compression.base_model.attention import Attention, CausalLM, attention_modules
from recalkv_vllm.compression.healing.projections import (
    LatentProjection,
    TrainedFactors,
    TrainedLinear,
)
from recalkv_vllm.compression.layer import LayerFactors


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
