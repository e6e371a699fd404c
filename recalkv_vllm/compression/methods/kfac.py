"""Factors of the least expected loss: Kronecker-factored Fisher metric, latents shared by K and V.

Low-rank factors are chosen under a metric on a projection's input and one on its output
(:mod:`..calibration.kronecker`), so that squared singular values are expected increases of the
model's loss, in one unit for all layers. Ranks, and the group size, are what makes their sum least
within a budget of cached elements and one of decode time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recalkv_vllm.band_format import token_bytes
from recalkv_vllm.checkpoint import SPAN_MULTIPLE, AttentionGeometry, LatentLayout, rank_budget
from recalkv_vllm.compression.calibration.statistics import Statistics
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.layer import (
    LayerFactors,
    LayerInputs,
    nested_factors,
    nested_layout,
    reorder_rows,
    split_factors,
    split_layout,
)
from recalkv_vllm.compression.lowrank.layer_metric import BOTH, KEYS, VALUES, LayerMetric
from recalkv_vllm.compression.lowrank.linalg import truncated_factors
from recalkv_vllm.compression.lowrank.nested import nested_latent
from recalkv_vllm.compression.methods.base import Measured, Method, MethodOptions, divisors
from recalkv_vllm.compression.methods.measured_layer import (
    MeasuredLayer,
    consecutive_groups,
    measure_nested,
    measure_split,
)
from recalkv_vllm.compression.methods.measured_sizes import HeadGrouping, measure_sizes
from recalkv_vllm.compression.plan import Budget, ModelPlan
from recalkv_vllm.compression.progress import track
from recalkv_vllm.compression.ranks.decode_time import LayerTimes, most_code_bits
from recalkv_vllm.compression.ranks.equal_pages import EqualPages
from recalkv_vllm.compression.ranks.few_shapes import (
    Allocation,
    Candidates,
    Shape,
    allocate_few,
)
from recalkv_vllm.compression.ranks.reachable import check_budget, check_compression
from recalkv_vllm.compression.ranks.two_budgets import LayerWays
from recalkv_vllm.compression.ranks.widths import Widths, candidate_widths
from recalkv_vllm.names import SPAN_KINDS

log = logging.getLogger(__name__)

#: Measured layers by group size.
MeasuredSizes = dict[int, list[MeasuredLayer]]


class KfacMethod(Method[Measured]):
    """What ``kfac`` is in any latent format: its metric, options, and split spans."""

    name = "kfac"
    allocations = ("loss",)
    span_kinds = SPAN_KINDS
    refits_output = True
    knows_loss = True
    #: Whether latents are in bands.
    bands = False

    def __init__(self, geometry: AttentionGeometry, options: MethodOptions):
        super().__init__(geometry, options)
        self.k_group_size = options.k_group_size  # None: a plan chooses one
        self.v_groups = options.v_groups or 1  # of split spans
        self._names_v_groups = options.v_groups is not None

    def observers(self, compression: float) -> set[str]:
        # Moments are for the report: relative errors of the outputs.
        return {"kronecker", "moments"} if compression > 0 else set()

    def settings(self, plan: ModelPlan) -> dict[str, Any]:
        loss = plan.expected_loss
        return {
            **super().settings(plan),
            "spans": plan.spans,
            "expected_loss": None if math.isnan(loss) else loss,  # JSON has no NaN
            "relative_decode_time": self.decode_time(plan),
        }

    def check_groups(self) -> None:
        """Raise :class:`InputError` for V groups where values are grouped as keys are."""
        if self.spans != "split" and self._names_v_groups:
            raise InputError(
                f"--v-groups {self.v_groups}: with {self.spans} spans values are grouped as keys "
                "are; expected --k-group-size, or --spans split"
            )

    def head_grouping(self, kept: float) -> HeadGrouping:
        """How heads are put into groups where ``kept`` of the cache's columns are kept."""
        which = KEYS if self.spans == "split" else BOTH  # what a group's heads share
        return HeadGrouping(self.geometry.head_dim, which, kept, self.allow_head_reordering)

    def factor_split(self, metric: LayerMetric, layout: LatentLayout) -> LayerFactors:
        """Latents of their own for every K group and every V group."""
        order = layout.head_order
        k_groups = consecutive_groups(order, layout.k_group_size)
        v_groups = consecutive_groups(order, len(order) // len(layout.v_spans))
        return split_factors(
            [metric.svd(group, KEYS).truncated(layout.k_width) for group in k_groups],
            [metric.svd(group, VALUES).truncated(layout.v_width) for group in v_groups],
            layout,
        )

    def times(self, k_group_size: int) -> LayerTimes:
        """Predicted times of a layer in groups of a size."""
        return LayerTimes(
            self.geometry, self.spans, k_group_size, self.v_groups, self.target, self.bands
        )

    def choose(
        self, sizes: Mapping[int, Candidates[Shape]], steps: int, limit: float
    ) -> tuple[int, Allocation[Shape]] | None:
        """The group size of least loss within both budgets, and the shapes of all layers; None if
        not even the budget of bytes can be met.

        If none is fast enough, one head or as few as there are in a group, as fast as it may be.

        Args:
            sizes: ways to store all layers, by group size.
            steps: of the budget of bytes.
            limit: of decode time.
        """
        if self.geometry.kinds_differ:
            capped = {size: EqualPages(candidates, steps) for size, candidates in sizes.items()}
            sizes = {size: candidates for size, candidates in capped.items() if candidates.possible}
        chosen = {
            size: allocation
            for size, candidates in sizes.items()
            if (allocation := allocate_few(candidates, steps, limit)) is not None
        }
        for size, candidates in sorted(sizes.items()):
            if chosen:
                break
            if (allocation := allocate_few(candidates, steps, math.inf)) is not None:
                chosen[size] = allocation
                log.warning(
                    "--target %s: no choice of spans decodes in %.2f of the dense cache's time; "
                    "taking %d KV heads per group, whatever time that takes",
                    self.target,
                    limit,
                    size,
                )
        if not chosen:
            return None
        # Of losses that differ by rounding only, the smaller group: it is cheaper to reconstruct.
        best = min(chosen, key=lambda size: (float(f"{chosen[size].loss:.9g}"), size))
        return best, chosen[best]

    def _sizes(self) -> list[int]:
        """Group sizes to choose from."""
        if self.k_group_size is not None:
            return [self.k_group_size]
        return divisors(self.geometry.num_kv_heads)


class Kfac(KfacMethod[MeasuredSizes]):
    """Two-sided Kronecker-factored metric, ranks by expected loss.

    Span kinds: ``nested`` (one latent per group; keys read as many of its first columns as the
    budget of time pays for and keys need), ``joint`` (keys and values read all of it),
    ``split`` (latents of their own).
    """

    def check(self, compression: float) -> None:
        if compression == 0:
            check_compression(compression, self.geometry, self._full_rank_size(), self.v_groups)
            return
        self.check_groups()
        largest = max(self._sizes())
        k_groups = self.geometry.num_kv_heads // largest
        if self.spans == "split":
            check_compression(compression, self.geometry, largest, self.v_groups)
        else:
            check_budget(compression, self.geometry, f"{k_groups} joint", k_groups)

    def measure(
        self,
        compression: float,
        layers: Sequence[LayerInputs],
        statistics: Statistics | None,
        before: MeasuredSizes | None = None,
    ) -> MeasuredSizes:
        """All widths of all layers, for every group size; nothing for full rank."""
        if compression == 0:
            return {}
        widths_of = {
            size: candidate_widths(self.spans, self.geometry, size, self.v_groups)
            for size in self._sizes()
        }

        def measure_layer(metric: LayerMetric, order: tuple[int, ...], size: int) -> MeasuredLayer:
            if self.spans == "split":
                return measure_split(metric, order, size, self.v_groups, widths_of[size])
            return measure_nested(metric, order, size, widths_of[size])

        grouping = self.head_grouping(1 - compression)
        tracked = track(layers, "choosing ranks", total=len(layers))
        return measure_sizes(tracked, widths_of, grouping, measure_layer, before)

    def plan(self, measured: MeasuredSizes, budget: Budget) -> ModelPlan:
        if budget.compression == 0:
            return self._full_rank_plan(budget)
        elements = rank_budget(budget.compression, self.geometry)
        sizes = {
            size: WidthCandidates(layers, [self._ways(layer, size, budget) for layer in layers])
            for size, layers in measured.items()
        }
        limit = self.target.limit_at(budget.removed, coded=budget.latent_format is not None)
        found = self.choose(sizes, elements // SPAN_MULTIPLE, limit)
        if found is None:
            raise InputError(
                f"compression {budget.compression:g}: leaves {elements} cached elements per token, "
                f"less than the narrowest {self.spans} spans; expected a lower --compression or "
                "another --k-group-size"
            )
        best, allocation = found
        layouts = (
            self._layout(layer.head_order, best, widths)
            for layer, widths in zip(measured[best], allocation.shapes, strict=True)
        )
        loss = allocation.loss / 2
        return ModelPlan(tuple(layouts), self.spans, budget.latent_format, loss)

    def factor(self, inputs: LayerInputs, plan: ModelPlan) -> LayerFactors:
        layout = plan.layouts[inputs.index]
        order = layout.head_order
        if inputs.fisher is None:  # full rank
            keys = reorder_rows(inputs.k_weight, order).chunk(len(layout.k_spans))
            values = reorder_rows(inputs.v_weight, order).chunk(len(layout.v_spans))
            return split_factors(
                [truncated_factors(weight, layout.k_width) for weight in keys],
                [truncated_factors(weight, layout.v_width) for weight in values],
                layout,
            )
        metric = LayerMetric(inputs, self.geometry.head_dim)
        if plan.spans == "split":
            return self.factor_split(metric, layout)
        latents = [
            nested_latent(
                metric.svd(group, BOTH),
                metric.group_metric(group, BOTH),
                layout.k_width,
                layout.v_width,
            )
            for group in consecutive_groups(order, layout.k_group_size)
        ]
        return nested_factors(latents, layout)

    def _layout(
        self, head_order: tuple[int, ...], k_group_size: int, widths: Widths
    ) -> LatentLayout:
        if self.spans == "split":
            return split_layout(
                head_order, k_group_size, self.v_groups, widths.k_width, widths.v_width
            )
        return nested_layout(head_order, k_group_size, widths.k_width, widths.v_width)

    def _full_rank_plan(self, budget: Budget) -> ModelPlan:
        """Split spans, each as wide as its group's heads."""
        geometry, size = self.geometry, self._full_rank_size()
        v_group_size = geometry.num_kv_heads // self.v_groups
        layout = split_layout(
            range(geometry.num_kv_heads),
            size,
            self.v_groups,
            size * geometry.head_dim,
            v_group_size * geometry.head_dim,
        )
        return ModelPlan((layout,) * geometry.num_layers, "split", budget.latent_format)

    def _full_rank_size(self) -> int:
        """The cheapest group size whose full rank is a multiple of 16."""
        head_dim = self.geometry.head_dim
        fitting = [n for n in self._sizes() if n * head_dim % SPAN_MULTIPLE == 0]
        return min(fitting, default=self._sizes()[-1])

    def _ways(self, layer: MeasuredLayer, size: int, budget: Budget) -> LayerWays:
        """What the widths of a layer cost."""
        losses = layer.totals(budget.latent_error)
        if not np.isfinite(losses).all():
            raise InputError("rank allocation: the expected losses of some ranks are not finite")
        times, stored = self.times(size), budget.latent_format
        return LayerWays(
            costs=np.array([w.rank // SPAN_MULTIPLE for w in layer.widths]),
            losses=losses,
            times=np.array(
                [
                    times(
                        w.k_width,
                        w.v_width,
                        token_bytes(stored, w.rank, 2),
                        most_code_bits(stored),
                    )
                    for w in layer.widths
                ]
            ),
        )


class WidthCandidates:
    """Widths of all layers in groups of one size.

    Args:
        measured: layers, all of the same widths.
        layers: what they cost.
    """

    def __init__(self, measured: Sequence[MeasuredLayer], layers: Sequence[LayerWays]):
        self.layers, self._widths = layers, measured[0].widths

    def shape(self, layer: int, way: int) -> Widths:
        """See :class:`..ranks.few_shapes.Candidates`."""
        return self._widths[way]

    def at(self, shapes: Sequence[Widths]) -> list[LayerWays]:
        """See :class:`..ranks.few_shapes.Candidates`."""
        at = [self._widths.index(shape) for shape in shapes]
        return [LayerWays(w.costs[at], w.losses[at], w.times[at]) for w in self.layers]
