"""What is measured while calibration text runs through the model; each measure is one class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.architectures import Attention


class Observer(Protocol):
    """Adds one sample after the other to sums over samples."""

    #: The observer needs the gradient of the language-modelling loss.
    needs_gradient: bool

    def shapes(self, geometry: AttentionGeometry) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the sums; the first axis is the decoder layer."""

    def attach(
        self, attention: Iterable[Attention], sums: Mapping[str, torch.Tensor]
    ) -> list[RemovableHandle]:
        """Hook into the model; hooks add to ``sums`` during the forward pass."""

    def after_backward(
        self, attention: Iterable[Attention], sums: Mapping[str, torch.Tensor]
    ) -> None:
        """Read gradients, where :attr:`needs_gradient`."""


class InputMoments:
    """Sums of ``x xᵀ`` and ``x`` over tokens, ``x`` the input of the key and value projections."""

    needs_gradient = False

    def shapes(self, geometry: AttentionGeometry) -> dict[str, tuple[int, ...]]:
        layers, hidden = geometry.num_layers, geometry.hidden_size
        return {"input_outer": (layers, hidden, hidden), "input": (layers, hidden)}

    def attach(
        self, attention: Iterable[Attention], sums: Mapping[str, torch.Tensor]
    ) -> list[RemovableHandle]:
        def hook(layer: int):
            def add(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                x = args[0].detach().flatten(0, -2).float()
                sums["input_outer"][layer] += (x.T @ x).cpu()
                sums["input"][layer] += x.sum(dim=0).cpu()

            return add

        return [
            module.k_proj.register_forward_pre_hook(hook(i)) for i, module in enumerate(attention)
        ]

    def after_backward(
        self, attention: Iterable[Attention], sums: Mapping[str, torch.Tensor]
    ) -> None:
        pass


class FisherDiagonal:
    """Diagonal of the empirical Fisher information of key and value projections.

    That is, the squared gradient of a sample's mean loss with respect to each weight, summed over
    samples. The second axis is K, V.
    """

    needs_gradient = True

    def shapes(self, geometry: AttentionGeometry) -> dict[str, tuple[int, ...]]:
        rows = geometry.num_kv_heads * geometry.head_dim
        return {"fisher": (geometry.num_layers, 2, rows, geometry.hidden_size)}

    def attach(
        self, attention: Iterable[Attention], sums: Mapping[str, torch.Tensor]
    ) -> list[RemovableHandle]:
        return []

    def after_backward(
        self, attention: Iterable[Attention], sums: Mapping[str, torch.Tensor]
    ) -> None:
        for layer, module in enumerate(attention):
            for column, projection in enumerate((module.k_proj, module.v_proj)):
                gradient = projection.weight.grad
                assert gradient is not None
                sums["fisher"][layer, column] += gradient.float().square().cpu()


#: Observers by the name that methods ask for.
OBSERVERS: dict[str, type[Observer]] = {"moments": InputMoments, "fisher": FisherDiagonal}
