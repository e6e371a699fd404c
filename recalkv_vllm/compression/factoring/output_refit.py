"""Closed-form refit of ``o_proj``: it costs no cached byte and no time in serving.

Layer after layer, the calibration text runs through the dense and the compressed model side by
side. Once a layer's keys and values are factored, its output projection becomes the least-squares
fit from the compressed model's attention heads to the dense model's attention output, and so makes
up for losses of this layer and of those before it, those of quantized latents among them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from recalkv_vllm.compression.base_model.attention import Attention, CausalLM, indexed_attention
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.latents.rounded_projection import rounded_projections
from recalkv_vllm.compression.layer import LayerFactors, natural_order, natural_rows
from recalkv_vllm.compression.plan import ModelPlan

#: Pull towards the model's own weights, relative to the mean square of the heads' outputs.
RIDGE = 1e-3


class _StopForward(Exception):  # noqa: N818 (not an error)
    """Ends a forward pass at the module that was asked for."""


class OutputRefit:
    """Hidden states of all samples in both models, in front of the next layer to refit.

    Args:
        model: the base model; its layers are changed one after the other.
        samples: ``[samples, seq_len]`` token ids.
        device: where layers run, one at a time.
        plan: tells how the compressed model's latents are stored; as plain elements without.
    """

    def __init__(
        self,
        model: CausalLM,
        samples: torch.Tensor,
        device: str,
        plan: ModelPlan | None = None,
    ):
        self._layers = model.model.layers
        attention = indexed_attention(model)
        #: Of layers with attention, in the decoder.
        self._indices = list(attention)
        self._attention = list(attention.values())
        self._device = device
        self._plan = plan
        self._arguments = _layer_arguments(model, samples[:1])
        self._dense = [
            _input_of(self._layers[0], partial(model.model, sample[None], use_cache=False))
            for sample in samples
        ]
        self._compressed = list(self._dense)
        #: The layer that hidden states are in front of.
        self._next = 0

    @torch.inference_mode()
    def refit(self, index: int, factors: LayerFactors) -> torch.Tensor:
        """Refit one layer, the next of all, and move both streams beyond it.

        Args:
            index: of the layer among those with attention.
            factors: its rounded factors.

        Returns:
            The weight of ``o_proj``, heads in natural order, in the factors' dtype.

        Raises:
            InputError: hidden states that are not finite.
        """
        self._pass_layers_without_attention(index)
        layer, attention = self._layer(index).to(self._device), self._attention[index]
        output = attention.o_proj
        dense = attention.k_proj, attention.v_proj
        compressed = self._projections(index, attention, factors)
        heads_outer = torch.zeros(output.in_features, output.in_features, device=self._device)
        residual_outer = torch.zeros_like(output.weight, dtype=torch.float32)
        for i, hidden in enumerate(self._dense):
            attention.k_proj, attention.v_proj = dense
            self._dense[i], target = self._run(index, hidden)
            attention.k_proj, attention.v_proj = compressed
            heads = self._heads(index, self._compressed[i])
            residual = (target - output(heads)).flatten(0, -2).float()
            heads = heads.flatten(0, -2).float()
            heads_outer += heads.T @ heads
            residual_outer += residual.T @ heads
        if not residual_outer.isfinite().all():
            raise InputError(
                f"refit of o_proj: hidden states of layer {index} are not finite; the model "
                "overflows in this precision (try --device cpu, or --no-output-refit)"
            )
        change = _ridge_regression(heads_outer.double(), residual_outer.double())
        weight = (output.weight.double() + change).to(factors.down.dtype)
        output.weight = nn.Parameter(weight.to(output.weight.dtype))
        for i, hidden in enumerate(self._compressed):
            self._compressed[i], _ = self._run(index, hidden)
        layer.to("cpu")
        return weight.cpu()

    def _layer(self, index: int) -> nn.Module:
        return self._layers[self._indices[index]]

    def _pass_layers_without_attention(self, index: int) -> None:
        """Move both streams to the layer ``index``, the next with attention."""
        for between in range(self._next, self._indices[index]):
            layer = self._layers[between].to(self._device)
            for stream in (self._dense, self._compressed):
                stream[:] = [self._call(between, hidden).to(hidden.device) for hidden in stream]
            layer.to("cpu")
        self._next = self._indices[index] + 1

    def _projections(
        self, index: int, attention: Attention, factors: LayerFactors
    ) -> tuple[Any, Any]:
        """The compressed model's key and value projections, heads in natural order."""
        order = factors.layout.head_order
        latent_format = None if self._plan is None else self._plan.latent_format(index)
        if latent_format is not None:
            return rounded_projections(factors, latent_format, natural_order(order), attention)
        keys, values = (natural_rows(product, order) for product in factors.products())
        return _with_weight(attention.k_proj, keys), _with_weight(attention.v_proj, values)

    def _run(self, index: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states after a layer, and the output of its ``o_proj``."""
        seen: list[torch.Tensor] = []
        handle = self._attention[index].o_proj.register_forward_hook(
            lambda _, args, output: seen.append(output)
        )
        try:
            output = self._call(self._indices[index], hidden)
        finally:
            handle.remove()
        return output.to(hidden.device), seen[0]

    def _heads(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """What goes into a layer's ``o_proj``: ``[1, tokens, h_q · d]``."""
        return _input_of(
            self._attention[index].o_proj, partial(self._call, self._indices[index], hidden)
        )

    def _call(self, decoder_layer: int, hidden: torch.Tensor) -> torch.Tensor:
        arguments = _to_device(self._arguments[decoder_layer], self._device)
        output = self._layers[decoder_layer](hidden.to(self._device), **arguments)
        return output[0] if isinstance(output, tuple) else output


@torch.inference_mode()
def _input_of(module: nn.Module, forward: Callable[[], Any]) -> torch.Tensor:
    """The first argument of ``module`` in a forward pass, which ends there."""
    seen: list[torch.Tensor] = []

    def stop(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0])
        raise _StopForward

    handle = module.register_forward_pre_hook(stop)
    try:
        with suppress(_StopForward):
            forward()
    finally:
        handle.remove()
    return seen[0]


def _layer_arguments(model: CausalLM, sample: torch.Tensor) -> list[dict[str, Any]]:
    """Keyword arguments of every decoder layer (masks, rotations), equal for all samples."""
    seen: list[dict[str, Any]] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, arguments: seen.append(arguments), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    try:
        with torch.inference_mode():
            model.model(sample, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _with_weight(linear: nn.Linear, weight: torch.Tensor) -> nn.Linear:
    """The same layer with another weight."""
    other = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    other.weight, other.bias = nn.Parameter(weight.to(linear.weight)), linear.bias
    return other


def _to_device(value: Any, device: str) -> Any:
    match value:
        case torch.Tensor():
            return value.to(device)
        case tuple():
            return tuple(_to_device(part, device) for part in value)
        case dict():
            return {name: _to_device(part, device) for name, part in value.items()}
    return value


def _ridge_regression(outer: torch.Tensor, residual_outer: torch.Tensor) -> torch.Tensor:
    """``Σ r cᵀ (Σ c cᵀ + ε·mean(λ)·I)⁻¹``: ``[H, n]``, the change that fits residuals ``r``."""
    ridge = RIDGE * outer.diagonal().mean()
    eye = torch.eye(len(outer), dtype=outer.dtype, device=outer.device)
    return torch.linalg.solve(outer + ridge * eye, residual_outer.T).T
