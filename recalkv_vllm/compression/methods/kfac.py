"""Factors of the least expected loss: Kronecker-factored Fisher metric, latents shared by K and V.

Low-rank factors are chosen under a metric on a projection's input and one on its output
(:mod:`..kronecker`), so that squared singular values are expected increases of the model's loss, in
one unit for all layers. Ranks, and the group size, are what makes their sum least within a budget
of cached numbers and one of reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recalkv_vllm.checkpoint import SPAN_MULTIPLE, AttentionGeometry, rank_budget
from recalkv_vllm.compression.allocation import Choice, allocate_choices, cheapest
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.factors import (
    LayerFactors,
    LayerInputs,
    nested_factors,
    reorder_rows,
    split_factors,
)
from recalkv_vllm.compression.layer_metric import BOTH, KEYS, VALUES, LayerMetric
from recalkv_vllm.compression.linalg import truncated_factors
from recalkv_vllm.compression.methods.base import Method, MethodOptions, divisors
from recalkv_vllm.compression.nested import nested_latent, nested_losses
from recalkv_vllm.compression.progress import track
from recalkv_vllm.compression.ranks import LayerPlan, check_budget, check_compression
from recalkv_vllm.compression.statistics import Statistics
from recalkv_vllm.compression.widths import SPAN_KINDS, Widths, candidate_widths


class Kfac(Method):
    """Two-sided Kronecker-factored metric, ranks by expected loss.

    Span kinds: ``nested`` (one latent per group; keys read as many of its first columns as the
    reconstruction budget pays for and keys need), ``joint`` (keys and values read all of it),
    ``split`` (latents of their own).
    """

    name = "kfac"
    allocations = ("loss",)
    span_kinds = SPAN_KINDS
    refits_output = True
    knows_loss = True

    def __init__(self, geometry: AttentionGeometry, options: MethodOptions):
        super().__init__(geometry, options)
        self.flop_per_byte = options.flop_per_byte
        self.k_group_size = options.k_group_size  # None until planned
        self.v_groups = options.v_groups or 1
        self._names_v_groups = options.v_groups is not None
        self._measured: dict[int, list[MeasuredLayer]] = {}

    def observers(self, compression: float) -> set[str]:
        # Moments are for the report: relative errors of the outputs.
        return {"kronecker", "moments"} if compression > 0 else set()

    def check(self, compression: float) -> None:
        if compression == 0:
            check_compression(compression, self.geometry, self._full_rank_size(), self.v_groups)
            return
        if self.spans != "split" and self._names_v_groups:
            raise InputError(
                f"--v-groups {self.v_groups}: with {self.spans} spans values are grouped as keys "
                "are; expected --k-group-size, or --spans split"
            )
        sizes = [size for size in self._sizes() if self._widths(size)]
        if not sizes:
            raise InputError(
                f"--target: no choice of {self.spans} spans rebuilds keys with as little as "
                f"{self.flop_per_byte:g} FLOP per cached byte; expected a larger budget, a "
                "smaller --k-group-size or --spans nested"
            )
        k_groups = self.geometry.num_kv_heads // max(sizes)
        if self.spans == "split":
            check_compression(compression, self.geometry, max(sizes), self.v_groups)
        else:
            check_budget(compression, self.geometry, f"{k_groups} joint", k_groups)

    def plan(
        self,
        compression: float,
        layers: Sequence[LayerInputs],
        statistics: Statistics | None,
        latent_error: float = 0.0,
    ) -> list[LayerPlan]:
        geometry = self.geometry
        if compression == 0:
            self.spans, self.k_group_size = "split", self._full_rank_size()
            v_heads = geometry.num_kv_heads // self.v_groups
            widths = self.k_group_size * geometry.head_dim, v_heads * geometry.head_dim
            return [LayerPlan(tuple(range(geometry.num_kv_heads)), *widths)] * len(layers)
        budget = rank_budget(compression, geometry)
        self._measure(layers, 1 - compression)
        widths_of = {size: self._widths(size) for size in self._sizes()}
        sizes = [
            size
            for size, widths in widths_of.items()
            if widths and len(layers) * min(w.rank for w in widths) <= budget
        ]
        chosen = {
            size: allocate_choices(
                [layer.choices(latent_error) for layer in self._measured[size]], budget
            )
            for size in sizes
        }
        losses = {size: sum(choice.loss for choice in chosen[size]) for size in sizes}
        # Of losses that differ by rounding only, the smaller group: it is cheaper to rebuild.
        best = min(sizes, key=lambda size: (float(f"{losses[size]:.9g}"), size))
        self.k_group_size, self.expected_loss = best, losses[best] / 2
        return [
            LayerPlan(layer.head_order, choice.widths.k_width, choice.widths.v_width)
            for layer, choice in zip(self._measured[best], chosen[best], strict=True)
        ]

    def factor(self, inputs: LayerInputs, plan: LayerPlan) -> LayerFactors:
        size, heads = self.k_group_size, len(plan.head_order)
        assert size is not None
        k_groups = chunks(plan.head_order, size)
        v_groups = chunks(plan.head_order, heads // self.v_groups)
        if inputs.fisher is None:  # full rank
            keys = reorder_rows(inputs.k_weight, plan.head_order).chunk(len(k_groups))
            values = reorder_rows(inputs.v_weight, plan.head_order).chunk(len(v_groups))
            return split_factors(
                [truncated_factors(weight, plan.k_width) for weight in keys],
                [truncated_factors(weight, plan.v_width) for weight in values],
                plan,
                size,
            )
        metric = LayerMetric(inputs, self.geometry.head_dim)
        if self.spans == "split":
            return split_factors(
                [metric.svd(group, KEYS).truncated(plan.k_width) for group in k_groups],
                [metric.svd(group, VALUES).truncated(plan.v_width) for group in v_groups],
                plan,
                size,
            )
        latents = [
            nested_latent(
                metric.svd(group, BOTH),
                metric.group_metric(group, BOTH),
                plan.k_width,
                plan.v_width,
            )
            for group in k_groups
        ]
        return nested_factors(latents, plan, size)

    def settings(self) -> dict[str, Any]:
        assert self.k_group_size is not None
        groups = self.geometry.num_kv_heads // self.k_group_size
        return {
            "k_group_size": self.k_group_size,
            "v_groups": self.v_groups if self.spans == "split" else groups,
            "spans": self.spans,
            "flop_per_byte": self.flop_per_byte if math.isfinite(self.flop_per_byte) else None,
            "expected_loss": self.expected_loss,
        }

    @property
    def _sharing(self) -> tuple[int, ...]:
        """The projections whose heads are grouped by what they lose together."""
        return KEYS if self.spans == "split" else BOTH

    def _sizes(self) -> list[int]:
        """Group sizes to choose from."""
        if self.k_group_size is not None:
            return [self.k_group_size]
        return divisors(self.geometry.num_kv_heads)

    def _full_rank_size(self) -> int:
        """The cheapest group size whose full rank is a multiple of 16."""
        head_dim = self.geometry.head_dim
        fitting = [n for n in self._sizes() if n * head_dim % SPAN_MULTIPLE == 0]
        return min(fitting, default=self._sizes()[-1])

    def _widths(self, size: int) -> list[Widths]:
        return candidate_widths(self.spans, self.geometry, size, self.v_groups, self.flop_per_byte)

    def _measure(self, layers: Sequence[LayerInputs], kept: float) -> None:
        """Measure all widths of all layers, unless a plan before this one did."""
        if self._measured:
            return
        widths_of = {size: self._widths(size) for size in self._sizes()}
        self._measured = {size: [] for size, widths in widths_of.items() if widths}
        for inputs in track(layers, "choosing ranks", total=len(layers)):
            metric = LayerMetric(inputs, self.geometry.head_dim)
            for size, measured in self._measured.items():
                order = tuple(range(inputs.num_kv_heads))
                if self.heads_move:
                    order = metric.head_order(size, kept, self._sharing)
                measured.append(self._measured_layer(metric, order, size, widths_of[size]))

    def _measured_layer(
        self, metric: LayerMetric, order: tuple[int, ...], size: int, widths: list[Widths]
    ) -> MeasuredLayer:
        k_widths = np.array([w.k_width for w in widths])
        v_widths = np.array([w.v_width for w in widths])
        losses, noises = np.zeros(len(widths)), np.zeros(len(widths))
        if self.spans == "split":
            v_size = len(order) // self.v_groups
            for group_size, which, ranks in ((size, KEYS, k_widths), (v_size, VALUES, v_widths)):
                for group in chunks(order, group_size):
                    svd = metric.svd(group, which)
                    losses += svd.losses(ranks)
                    noises += svd.noise(ranks)
        else:
            for group in chunks(order, size):
                svd, outputs = metric.svd(group, BOTH), metric.group_metric(group, BOTH)
                losses += nested_losses(svd, outputs, k_widths, v_widths)
                noises += svd.noise(v_widths)
        return MeasuredLayer(order, widths, losses, noises)


@dataclass(frozen=True, slots=True)
class MeasuredLayer:
    """What one layer's widths cost: ``losses`` by truncation, ``noises`` per relative error of
    stored latents."""

    head_order: tuple[int, ...]
    widths: list[Widths]
    losses: np.ndarray
    noises: np.ndarray

    def choices(self, latent_error: float) -> list[Choice]:
        """The best widths of every rank, for latents stored with this relative error."""
        totals = self.losses + latent_error * self.noises
        return cheapest([Choice(w, float(t)) for w, t in zip(self.widths, totals, strict=True)])


def chunks(order: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    """Groups of ``size`` heads that are next to each other."""
    return [order[i : i + size] for i in range(0, len(order), size)]
