"""Queries and latents by one matrix product on a CPU, where a short one reads memory slowly."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.platforms import current_platform


def can_be_joined(projections: list[LinearBase]) -> bool:
    """Whether they are on a CPU and not quantized."""
    return current_platform.is_cpu() and all(
        type(each.quant_method) is UnquantizedLinearMethod for each in projections
    )


class JointProjection:
    """Several projections of the same input as one.

    They stay modules of their own, for loaders and for reloads, which may bring the weights of one
    alone. The packed weights are those of all: a projection by itself gives its part.
    """

    def __init__(self, projections: list[LinearBase]):
        self._projections: list[Any] = projections
        self._widths: list[int] = []

    def pack(self) -> None:
        """Take the weights that vLLM has packed; to be called whenever weights were loaded."""
        joint: Any = nn.Module()
        weights = [_weights(each) for each in self._projections]
        joint.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
        joint.bias = self._bias(weights)
        dispatch_cpu_unquantized_gemm(joint, remove_weight=True)
        self._widths = [len(of_one) for of_one in weights]
        self._product, self._weight, self._bias_of_all = joint.cpu_linear, joint.weight, joint.bias
        for i, each in enumerate(self._projections):
            each.cpu_linear = partial(self._part, i)

    def _bias(self, weights: list[torch.Tensor]) -> nn.Parameter | None:
        biases = [each.bias for each in self._projections]
        if all(bias is None for bias in biases):
            return None
        pairs = zip(biases, weights, strict=True)
        whole = [w.new_zeros(len(w)) if b is None else b.to(w.dtype) for b, w in pairs]
        return nn.Parameter(torch.cat(whole), requires_grad=False)

    def _part(
        self, index: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """As vLLM calls ``cpu_linear``, with the one projection's own parameters."""
        of_one = self._product(x, self._weight, None).split(self._widths, dim=-1)[index]
        return of_one if bias is None else of_one + bias.to(of_one.dtype)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What each of the projections makes of ``x: [tokens, hidden_size]``."""
        return self._product(x, self._weight, self._bias_of_all).split(self._widths, dim=-1)


def _weights(projection: Any) -> torch.Tensor:
    """``[out, in]`` of a projection that vLLM has packed: what it makes of the unit vectors."""
    inputs = torch.eye(projection.input_size, dtype=projection.params_dtype)
    return projection.cpu_linear(inputs, projection.weight, None).T.contiguous()
