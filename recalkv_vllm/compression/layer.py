"""The story of one layer's key and value weights: inputs, plan, factors.

:class:`LayerInputs` is what there is to factor. A method plans a layout for it
(:func:`split_layout` or :func:`nested_layout`), finds factors for every head group, and stacks them
into :class:`LayerFactors` (:func:`split_factors` or :func:`nested_factors`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recalkv_vllm.checkpoint import LatentLayout
from recalkv_vllm.span import Span

#: Up and down factor of one projection of one head group.
Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """Moments of the input ``x`` of one layer's key and value projections, float64.

    Args:
        second_moment: ``[H, H]``, mean of ``x xᵀ`` over tokens (not centered).
        mean: ``[H]``.
    """

    second_moment: torch.Tensor
    mean: torch.Tensor


@dataclass(frozen=True, slots=True)
class FisherFactors:
    """Kronecker factors of one layer's Fisher information, float64 (:mod:`.calibration.kronecker`).

    Args:
        inputs: ``A: [H, H]``.
        outputs: ``G: [2·h_kv·d, 2·h_kv·d]``; rows of K, then of V, heads in natural order.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What a method factors.

    Args:
        index: of the layer in the model.
        k_weight: ``[h_kv · d, H]``, float64, heads in natural order.
        v_weight: the same.
        num_kv_heads: ``h_kv``.
        statistics: only if the method asks for them.
        fisher: only if the method asks for it.
    """

    index: int
    k_weight: torch.Tensor
    v_weight: torch.Tensor
    num_kv_heads: int
    statistics: InputStatistics | None = None
    fisher: FisherFactors | None = None


@dataclass(frozen=True, slots=True)
class LayerFactors:
    """A layer's layout and factors, shapes as :meth:`LatentLayout.factor_shapes`.

    ``output`` and ``query`` are weights of ``o_proj`` and ``q_proj``, heads in natural order, where
    they are not the base model's.
    """

    layout: LatentLayout
    down: torch.Tensor
    k_up: torch.Tensor
    v_up: torch.Tensor
    output: torch.Tensor | None = None
    query: torch.Tensor | None = None

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


def split_layout(
    head_order: Sequence[int], k_group_size: int, v_groups: int, k_width: int, v_width: int
) -> LatentLayout:
    """Every K group and every V group has a span of its own: all of K, then all of V."""
    k_groups = len(head_order) // k_group_size
    k_spans = _consecutive_spans(0, k_width, k_groups)
    v_spans = _consecutive_spans(k_spans[-1].end, v_width, v_groups)
    return LatentLayout(v_spans[-1].end, k_group_size, k_spans, v_spans, tuple(head_order))


def nested_layout(
    head_order: Sequence[int], k_group_size: int, k_width: int, width: int
) -> LatentLayout:
    """Every group has one span of ``width``: values read it whole, keys its first ``k_width``.

    Equal widths make a joint latent.
    """
    v_spans = _consecutive_spans(0, width, len(head_order) // k_group_size)
    k_spans = tuple(Span(span.start, span.start + k_width) for span in v_spans)
    return LatentLayout(v_spans[-1].end, k_group_size, k_spans, v_spans, tuple(head_order))


def split_factors(keys: list[Factors], values: list[Factors], layout: LatentLayout) -> LayerFactors:
    """A layer of :func:`split_layout`.

    Args:
        keys: ``L: [s·d, k_width]`` and ``R: [k_width, H]`` of every K group.
        values: the same of every V group.
        layout: of the layer.
    """
    return LayerFactors(
        layout,
        down=torch.cat([down for _, down in keys + values]),
        k_up=torch.stack([up for up, _ in keys]),
        v_up=torch.cat([up for up, _ in values]).unflatten(0, (len(layout.head_order), -1)),
    )


def nested_factors(groups: list[Factors], layout: LatentLayout) -> LayerFactors:
    """A layer of :func:`nested_layout`.

    Args:
        groups: of every group, ``L: [2·s·d, width]`` (K rows, then V rows; K rows are zero beyond
            column ``k_width``) and ``R: [width, H]``.
        layout: of the layer.
    """
    ups = [up.chunk(2) for up, _ in groups]
    return LayerFactors(
        layout,
        down=torch.cat([down for _, down in groups]),
        k_up=torch.stack([k_up[:, : layout.k_width] for k_up, _ in ups]),
        v_up=torch.cat([v_up for _, v_up in ups]).unflatten(0, (len(layout.head_order), -1)),
    )


def _consecutive_spans(start: int, width: int, count: int) -> tuple[Span, ...]:
    """``count`` spans of one width, one after the other."""
    return tuple(Span(start + i * width, start + (i + 1) * width) for i in range(count))


def reorder_rows(tensor: torch.Tensor, head_order: Sequence[int]) -> torch.Tensor:
    """Rows of KV heads in a new order; works for weights ``[h_kv · n, H]`` and biases."""
    heads = tensor.unflatten(0, (len(head_order), -1))
    return heads[list(head_order)].flatten(0, 1)


def natural_order(head_order: Sequence[int]) -> tuple[int, ...]:
    """The order that puts reordered heads back: the inverse permutation."""
    return tuple(sorted(range(len(head_order)), key=head_order.__getitem__))


def natural_rows(tensor: torch.Tensor, head_order: Sequence[int]) -> torch.Tensor:
    """The inverse of :func:`reorder_rows`."""
    return reorder_rows(tensor, natural_order(head_order))
