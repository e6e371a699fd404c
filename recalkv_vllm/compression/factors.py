"""Factors of one layer, and what follows from them whatever their spans."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recalkv_vllm.checkpoint import LatentLayout
from recalkv_vllm.compression.statistics import InputStatistics


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What a method factors: one layer's weights ``[h_kv · d, H]`` in float64 and natural head
    order, and the statistics of their input where the method asks for them."""

    k_weight: torch.Tensor
    v_weight: torch.Tensor
    num_kv_heads: int
    statistics: InputStatistics | None


@dataclass(frozen=True, slots=True)
class LayerFactors:
    """A layer's layout and factors, shapes as :meth:`LatentLayout.factor_shapes`."""

    layout: LatentLayout
    down: torch.Tensor
    k_up: torch.Tensor
    v_up: torch.Tensor

    def to(self, dtype: torch.dtype) -> LayerFactors:
        """Round all factors."""
        return LayerFactors(
            self.layout, self.down.to(dtype), self.k_up.to(dtype), self.v_up.to(dtype)
        )

    def products(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense key and value weights ``[h_kv · d, H]`` in float32, in the layout's head order."""
        down = self.down.float()
        keys = [
            up @ down[start:end]
            for up, (start, end) in zip(self.k_up.float(), self.layout.k_spans, strict=True)
        ]
        per_group = len(self.v_up) // len(self.layout.v_spans)
        values = [
            up.flatten(0, 1) @ down[start:end]
            for up, (start, end) in zip(
                self.v_up.float().split(per_group), self.layout.v_spans, strict=True
            )
        ]
        return torch.cat(keys), torch.cat(values)


def reorder_rows(tensor: torch.Tensor, head_order: tuple[int, ...]) -> torch.Tensor:
    """Rows of KV heads in a new order; works for weights ``[h_kv · n, H]`` and biases."""
    heads = tensor.unflatten(0, (len(head_order), -1))
    return heads[list(head_order)].flatten(0, 1)
