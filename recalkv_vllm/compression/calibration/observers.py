"""What is measured while calibration text runs through the model; each measure is one class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.base_model.attention import Attention
from recalkv_vllm.compression.calibration.first_rows import Rows


class Observer:
    """Adds one sample after the other to sums over samples."""

    #: The observer needs the gradient of the language-modeling loss.
    needs_gradient: ClassVar[bool] = False

    def shapes(self, geometry: AttentionGeometry) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the sums; the first axis is the decoder layer."""
        return {}

    def prepare(
        self,
        samples: torch.Tensor,
        sums: Mapping[str, torch.Tensor],
        rows_of: Callable[[int], Rows],
    ) -> None:
        """Called once before the pass over ``samples: [samples, seq_len]``.

        ``rows_of(index)`` gives what the projections of all layers see of a sample.
        """

    def samples_to_prepare(self, samples: torch.Tensor, sums: Mapping[str, torch.Tensor]) -> int:
        """How many of ``samples: [samples, seq_len]``, the first, :meth:`prepare` looks at."""
        return 0

    def add_rows(self, rows: Rows, sums: Mapping[str, torch.Tensor]) -> None:
        """Add a sample without running it, from what the projections of all layers see of it."""
        raise NotImplementedError

    def attach(
        self, attention: Sequence[Attention], sums: Mapping[str, torch.Tensor]
    ) -> list[RemovableHandle]:
        """Hook into the model; hooks may add to ``sums`` during the forward pass."""
        return []

    def after_backward(
        self, attention: Sequence[Attention], sums: Mapping[str, torch.Tensor]
    ) -> None:
        """Read gradients, where :attr:`needs_gradient`."""


class InputMoments(Observer):
    """Sums of ``x xᵀ`` and ``x`` over tokens, ``x`` the input of the key and value projections."""

    def shapes(self, geometry: AttentionGeometry) -> dict[str, tuple[int, ...]]:
        layers, hidden = geometry.num_layers, geometry.hidden_size
        return {"input_outer": (layers, hidden, hidden), "input": (layers, hidden)}

    def attach(
        self, attention: Sequence[Attention], sums: Mapping[str, torch.Tensor]
    ) -> list[RemovableHandle]:
        def hook(layer: int):
            def add(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                self._add(layer, args[0].detach().flatten(0, -2), sums)

            return add

        return [
            module.k_proj.register_forward_pre_hook(hook(i)) for i, module in enumerate(attention)
        ]

    def add_rows(self, rows: Rows, sums: Mapping[str, torch.Tensor]) -> None:
        for layer, (x, _) in enumerate(rows):
            self._add(layer, x, sums)

    @staticmethod
    def _add(layer: int, x: torch.Tensor, sums: Mapping[str, torch.Tensor]) -> None:
        x = x.float()
        sums["input_outer"][layer] += (x.T @ x).cpu()
        sums["input"][layer] += x.sum(dim=0).cpu()


class FisherDiagonal(Observer):
    """Diagonal of the empirical Fisher information of key and value projections.

    That is, the squared gradient of a sample's loss (summed over its tokens) with respect to each
    weight, summed over samples. The second axis is K, V.
    """

    needs_gradient = True

    def shapes(self, geometry: AttentionGeometry) -> dict[str, tuple[int, ...]]:
        rows = geometry.num_kv_heads * geometry.head_dim
        return {"fisher": (geometry.num_layers, 2, rows, geometry.hidden_size)}

    def attach(
        self, attention: Sequence[Attention], sums: Mapping[str, torch.Tensor]
    ) -> list[RemovableHandle]:
        for module in attention:
            module.k_proj.weight.requires_grad_(True)
            module.v_proj.weight.requires_grad_(True)
        return []

    def after_backward(
        self, attention: Sequence[Attention], sums: Mapping[str, torch.Tensor]
    ) -> None:
        for layer, module in enumerate(attention):
            for column, projection in enumerate((module.k_proj, module.v_proj)):
                gradient = projection.weight.grad
                assert gradient is not None
                sums["fisher"][layer, column] += gradient.float().square().cpu()

    def add_rows(self, rows: Rows, sums: Mapping[str, torch.Tensor]) -> None:
        for layer, (x, g) in enumerate(rows):
            gradients = (g.float().T @ x.float()).chunk(2)
            for column, gradient in enumerate(gradients):
                sums["fisher"][layer, column] += gradient.square().cpu()
