"""One layer's key and value projections under its Fisher metric, by group of heads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from recalkv_vllm.checkpoint import SPAN_MULTIPLE
from recalkv_vllm.compression.layer import LayerInputs
from recalkv_vllm.compression.lowrank.grouping import block_alignment, group_heads
from recalkv_vllm.compression.lowrank.linalg import GRADIENT_DAMPING, damped, output_moment
from recalkv_vllm.compression.lowrank.loss_grouping import improve_grouping
from recalkv_vllm.compression.lowrank.two_sided import (
    TwoSidedSvd,
    roots,
    two_sided_squares,
    two_sided_svd,
)

KEYS, VALUES, BOTH = (0,), (1,), (0, 1)


class LayerMetric:
    """The stacked projections ``[W_k; W_v]`` and the damped factors of their Fisher information.

    A group of heads is given as the heads' indices, and which of K (0) and V (1) it takes.
    """

    def __init__(self, inputs: LayerInputs, head_dim: int):
        assert inputs.fisher is not None
        self.num_heads = inputs.num_kv_heads
        self.head_dim = head_dim
        self.weight = torch.cat((inputs.k_weight, inputs.v_weight))
        self.input_metric = damped(inputs.fisher.inputs)
        self.output_metric = damped(inputs.fisher.outputs, GRADIENT_DAMPING)

    @cached_property
    def moment(self) -> torch.Tensor:
        """``W A Wᵀ`` of the stack, of which every group has its part."""
        return output_moment(self.weight, self.input_metric)

    def _rows(self, heads: Sequence[int], which: Sequence[int]) -> torch.Tensor:
        """Row indices of heads in the stack: K heads in the order given, then V heads."""
        first = torch.tensor([[kind * self.num_heads + h for h in heads] for kind in which])
        return (first.flatten()[:, None] * self.head_dim + torch.arange(self.head_dim)).flatten()

    def group_metric(self, heads: Sequence[int], which: Sequence[int]) -> torch.Tensor:
        """``G`` of a group, ``[n, n]``."""
        rows = self._rows(heads, which)
        return self.output_metric[rows][:, rows]

    def svd(self, heads: Sequence[int], which: Sequence[int]) -> TwoSidedSvd:
        """Factors of every rank of a group."""
        rows = self._rows(heads, which)
        moment = self.moment[rows][:, rows]
        return two_sided_svd(self.weight[rows], moment, self.group_metric(heads, which))

    def head_order(self, size: int, kept: float, which: Sequence[int]) -> tuple[int, ...]:
        """KV heads so ordered that groups of ``size`` with the least loss are contiguous.

        Args:
            size: heads per group.
            kept: fraction of the cache that is kept; sets the rank at which losses are compared.
            which: the projections that share a latent.
        """
        heads = range(self.num_heads)
        if not 1 < size < self.num_heads:
            return tuple(heads)
        width = len(which) * size * self.head_dim
        rank = max(SPAN_MULTIPLE, int(kept * width) // SPAN_MULTIPLE * SPAN_MULTIPLE)

        def loss(group: tuple[int, ...]) -> float:
            rows = self._rows(group, which)
            moment = self.moment[rows][:, rows]
            squares = two_sided_squares(moment, self.output_metric[rows][:, rows])
            return float(squares[rank:].sum())

        grouping = improve_grouping(group_heads(self._alignment(which), size), loss)
        return tuple(head for group in grouping for head in group)

    def _alignment(self, which: Sequence[int]) -> np.ndarray:
        """Similarity of heads under the metric: ``[heads, heads]``."""
        by_head = [self._rows([head], which) for head in range(self.num_heads)]
        halves = [roots(self.output_metric[rows][:, rows])[0] for rows in by_head]
        half = torch.block_diag(*halves)
        rows = torch.cat(by_head)
        return block_alignment(half @ self.moment[rows][:, rows] @ half.T, self.num_heads)
