"""Factors of one layer, and what follows from them whatever their spans."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recalkv_vllm.checkpoint import LatentLayout
from recalkv_vllm.compression.ranks import LayerPlan
from recalkv_vllm.compression.statistics import FisherFactors, InputStatistics
from recalkv_vllm.span import Span

#: Up and down factor of one projection of one head group.
Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What a method factors: one layer's weights ``[h_kv · d, H]`` in float64 and natural head
    order, and the statistics that the method asks for."""

    k_weight: torch.Tensor
    v_weight: torch.Tensor
    num_kv_heads: int
    statistics: InputStatistics | None = None
    fisher: FisherFactors | None = None


@dataclass(frozen=True, slots=True)
class LayerFactors:
    """A layer's layout and factors, shapes as :meth:`LatentLayout.factor_shapes`.

    ``output`` is the refitted weight of ``o_proj``, heads in natural order, if there is one.
    """

    layout: LatentLayout
    down: torch.Tensor
    k_up: torch.Tensor
    v_up: torch.Tensor
    output: torch.Tensor | None = None

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


def natural_rows(tensor: torch.Tensor, head_order: tuple[int, ...]) -> torch.Tensor:
    """The inverse of :func:`reorder_rows`."""
    inverse = sorted(range(len(head_order)), key=head_order.__getitem__)
    return reorder_rows(tensor, tuple(inverse))


def consecutive_spans(start: int, width: int, count: int) -> tuple[Span, ...]:
    """``count`` spans of one width, one after the other."""
    return tuple(Span(start + i * width, start + (i + 1) * width) for i in range(count))


def split_factors(
    keys: list[Factors], values: list[Factors], plan: LayerPlan, k_group_size: int
) -> LayerFactors:
    """A layer whose groups have latents of their own.

    Args:
        keys: ``L: [s·d, k_width]`` and ``R: [k_width, H]`` of every K group.
        values: the same of every V group.
        plan: the widths.
        k_group_size: ``s``.
    """
    k_spans = consecutive_spans(0, plan.k_width, len(keys))
    v_spans = consecutive_spans(k_spans[-1][1], plan.v_width, len(values))
    return LayerFactors(
        layout=LatentLayout(v_spans[-1][1], k_group_size, k_spans, v_spans, plan.head_order),
        down=torch.cat([down for _, down in keys + values]),
        k_up=torch.stack([up for up, _ in keys]),
        v_up=torch.cat([up for up, _ in values]).unflatten(0, (len(plan.head_order), -1)),
    )


def nested_factors(groups: list[Factors], plan: LayerPlan, k_group_size: int) -> LayerFactors:
    """A layer whose groups each have one latent: values read it whole, keys its first columns.

    Args:
        groups: of every group, ``L: [2·s·d, v_width]`` (K rows, then V rows; K rows are zero
            beyond column ``k_width``) and ``R: [v_width, H]``.
        plan: the widths; equal ones make a joint latent.
        k_group_size: ``s``.
    """
    spans = consecutive_spans(0, plan.v_width, len(groups))
    ups = [up.chunk(2) for up, _ in groups]
    return LayerFactors(
        layout=LatentLayout(
            spans[-1][1],
            k_group_size,
            tuple(Span(start, start + plan.k_width) for start, _ in spans),
            spans,
            plan.head_order,
        ),
        down=torch.cat([down for _, down in groups]),
        k_up=torch.stack([k_up[:, : plan.k_width] for k_up, _ in ups]),
        v_up=torch.cat([v_up for _, v_up in ups]).unflatten(0, (len(plan.head_order), -1)),
    )
