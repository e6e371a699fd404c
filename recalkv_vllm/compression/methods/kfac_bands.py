"""``kfac`` with latents in bands: ranks and bits of all layers at once, by the loss they leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from recalkv_vllm.band_format import BLOCK_COLUMNS, PLANES, Band, BandFormat
from recalkv_vllm.checkpoint import AttentionGeometry, LatentLayout
from recalkv_vllm.compression.calibration.statistics import Statistics
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.layer import (
    LayerFactors,
    LayerInputs,
    nested_factors,
    nested_layout,
    split_layout,
)
from recalkv_vllm.compression.lowrank.layer_metric import LayerMetric
from recalkv_vllm.compression.lowrank.regions import stack_regions
from recalkv_vllm.compression.methods.banded_layer import (
    BandedLayer,
    BandedWay,
    BandShape,
    group_latent,
    measure_bands,
)
from recalkv_vllm.compression.methods.kfac import KfacMethod
from recalkv_vllm.compression.methods.measured_layer import consecutive_groups
from recalkv_vllm.compression.methods.measured_sizes import measure_sizes
from recalkv_vllm.compression.plan import Budget, ModelPlan
from recalkv_vllm.compression.progress import track
from recalkv_vllm.compression.ranks.reachable import largest_compression
from recalkv_vllm.compression.ranks.two_budgets import LayerWays

#: Steps of the budget of bytes, at most, that layers are chosen in.
BUDGET_STEPS = 8192
#: Columns that bands keep for each 16 bits: about 4 bits for each.
COLUMNS_PER_16_BITS = 4

#: Measured layers by group size.
MeasuredBands = dict[int, list[BandedLayer]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BandedPlan(ModelPlan):
    """A plan of layouts with bands.

    Args:
        key_regions: of all layers, see :class:`BandShape`.
    """

    key_regions: tuple[int | None, ...]


class KfacBands(KfacMethod[MeasuredBands]):
    """As ``Kfac``, with every block of columns in as many bits as it is worth.

    Span kinds as there. ``nested`` latents are in two regions, one that keys and values read and
    one of the values' own; a layer whose keys can afford to read all of it may have a joint one.
    """

    bands = True

    def check(self, compression: float) -> None:
        self.check_groups()
        geometry = self.geometry
        # One block of the fewest bits in every group.
        groups = min(geometry.num_kv_heads // size for size in self._sizes())
        spans = groups + self.v_groups if self.spans == "split" else groups
        narrowest = BandFormat((Band(BLOCK_COLUMNS, min(PLANES)),) * spans)
        least = narrowest.slot_bytes(narrowest.rank) * geometry.num_layers
        token_bytes = budget_bytes(compression, geometry)
        if token_bytes < least:
            possible = largest_compression(least, 2 * geometry.dense_width * geometry.num_layers)
            raise InputError(
                f"compression {compression}: leaves {token_bytes} bytes per token, less than the "
                f"{least} of the narrowest bands; the largest possible compression with these "
                f"groups is {possible:g}"
            )

    def measure(
        self,
        compression: float,
        layers: Sequence[LayerInputs],
        statistics: Statistics | None,
        before: MeasuredBands | None = None,
    ) -> MeasuredBands:
        """All ways to store all layers, for every group size."""

        def measure_layer(metric: LayerMetric, order: tuple[int, ...], size: int) -> BandedLayer:
            times = self.times(size)
            return measure_bands(metric, order, size, self.v_groups, self.spans, times)

        grouping = self.head_grouping(min(1.0, COLUMNS_PER_16_BITS * (1 - compression)))
        tracked = track(layers, "choosing bits", total=len(layers))
        return measure_sizes(tracked, self._sizes(), grouping, measure_layer, before)

    def plan(self, measured: MeasuredBands, budget: Budget) -> BandedPlan:
        token_bytes = budget_bytes(budget.compression, self.geometry)
        step = -(-token_bytes // BUDGET_STEPS)
        sizes = {
            size: BandCandidates(layers, step)
            for size, layers in measured.items()
            if all(layer.ways for layer in layers)
        }
        limit = self.target.limit_at(budget.removed, coded=True)
        found = self.choose(sizes, token_bytes // step, limit)
        if found is None:
            raise InputError(
                f"compression {budget.compression}: leaves {token_bytes} bytes per token, less "
                f"than the narrowest bands of {self.spans} spans take; expected a lower "
                "--compression, or another --k-group-size"
            )
        best, allocation = found
        shapes = allocation.shapes
        layouts = (
            self._banded_layout(layer.head_order, best, shape)
            for layer, shape in zip(measured[best], shapes, strict=True)
        )
        return BandedPlan(
            tuple(layouts),
            self.spans,
            expected_loss=allocation.loss / 2,
            key_regions=tuple(shape.key_region for shape in shapes),
        )

    def factor(self, inputs: LayerInputs, plan: ModelPlan) -> LayerFactors:
        assert isinstance(plan, BandedPlan)
        layout, key_region = plan.layouts[inputs.index], plan.key_regions[inputs.index]
        metric = LayerMetric(inputs, self.geometry.head_dim)
        if plan.spans == "split":
            return self.factor_split(metric, layout)
        widths = [layout.k_width]
        if key_region is not None:
            widths.append(layout.v_width - layout.k_width)
        latents = [
            stack_regions(group_latent(metric, group).regions(key_region).regions, widths)
            for group in consecutive_groups(layout.head_order, layout.k_group_size)
        ]
        return nested_factors(latents, layout)

    def _banded_layout(
        self, head_order: tuple[int, ...], k_group_size: int, shape: BandShape
    ) -> LatentLayout:
        first, *rest = shape.regions
        if self.spans == "split":
            (values,) = rest
            layout = split_layout(
                head_order, k_group_size, self.v_groups, first.width, values.width
            )
            return replace(layout, bands=first.bands * first.groups + values.bands * values.groups)
        width = sum(region.width for region in shape.regions)
        bands = tuple(band for region in shape.regions for band in region.bands)
        layout = nested_layout(head_order, k_group_size, first.width, width)
        return replace(layout, bands=bands * first.groups)


def budget_bytes(compression: float, geometry: AttentionGeometry) -> int:
    """Bytes per token, over all layers, that are left of a cache of 16-bit elements."""
    # 1e-9: a product that is a whole number must not fall below it by rounding of the float.
    return int((1 - compression) * 2 * geometry.dense_width * geometry.num_layers + 1e-9)


class BandCandidates:
    """Ways to store all layers in groups of one size.

    Args:
        measured: layers.
        step: bytes of a step of the budget.
    """

    def __init__(self, measured: Sequence[BandedLayer], step: int):
        self._measured, self._step = measured, step
        self.layers = [self._ways(layer.ways) for layer in measured]

    def shape(self, layer: int, way: int) -> BandShape:
        """See :class:`..ranks.few_shapes.Candidates`."""
        return self._measured[layer].ways[way].shape

    def at(self, shapes: Sequence[BandShape]) -> list[LayerWays]:
        """See :class:`..ranks.few_shapes.Candidates`."""
        return [
            self._ways([layer.stored_as(shape) for shape in shapes]) for layer in self._measured
        ]

    def _ways(self, ways: Sequence[BandedWay]) -> LayerWays:
        return LayerWays(
            costs=np.array([-(-way.token_bytes // self._step) for way in ways]),
            losses=np.array([way.loss for way in ways]),
            times=np.array([way.time for way in ways]),
        )
