"""What goes into the key and value projections, and the loss gradient that comes back to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch.utils.hooks import RemovableHandle

from recalkv_vllm.compression.base_model.attention import Attention
from recalkv_vllm.compression.calibration.first_rows import Rows
from recalkv_vllm.compression.calibration.observers import Observer


class ProjectionTrace(Observer):
    """Inputs and output gradients of the key and value projections, one sample at a time."""

    needs_gradient = True

    def __init__(self) -> None:
        self._inputs: dict[int, torch.Tensor] = {}
        self._gradients: dict[tuple[int, int], torch.Tensor] = {}

    def attach(
        self, attention: Sequence[Attention], sums: Mapping[str, torch.Tensor]
    ) -> list[RemovableHandle]:
        """Hook into the model: outputs get hooks of their own that keep their gradient."""
        handles = []
        for layer, module in enumerate(attention):
            for column, projection in enumerate((module.k_proj, module.v_proj)):
                hook = partial(self._forward, layer, column)
                handles.append(projection.register_forward_hook(hook))
        return handles

    def _forward(self, layer: int, column: int, _, args, output: torch.Tensor) -> None:
        self._inputs[layer] = args[0].detach().flatten(0, -2)
        output.register_hook(partial(self._backward, layer, column))

    def _backward(self, layer: int, column: int, gradient: torch.Tensor) -> None:
        self._gradients[layer, column] = gradient.flatten(0, -2)

    def take(self) -> Rows:
        """``x: [tokens, H]`` and ``g: [tokens, 2 · h_kv · d]`` (K, then V) of the last sample."""
        for layer in range(len(self._inputs)):
            gradients = [self._gradients.pop((layer, column)) for column in (0, 1)]
            yield self._inputs.pop(layer), torch.cat(gradients, dim=1)
