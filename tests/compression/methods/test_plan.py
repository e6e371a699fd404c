"""Plans are values: made of measurements and a budget, whatever was planned before."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch

from recalkv_vllm.band_format import BLOCK_COLUMNS
from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.calibration.statistics import collect
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.factoring.factor_layers import ModelLayers
from recalkv_vllm.compression.latents.format_choice import budget_of
from recalkv_vllm.compression.lowrank.layer_metric import BOTH, LayerMetric
from recalkv_vllm.compression.methods import METHODS, KfacBands, MethodOptions
from recalkv_vllm.compression.plan import Budget
from recalkv_vllm.compression.ranks.bands import quantizer_error
from recalkv_vllm.compression.ranks.targets import Target, parse_target
from recalkv_vllm.latent_format import LatentFormat
from recalkv_vllm.names import METHOD_NAMES

SAMPLES = torch.randint(1, 512, (16, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def layers(tiny, geometry, load) -> ModelLayers:
    statistics = collect({"fisher", "kronecker", "moments"}, SAMPLES, geometry, "key", load)
    return ModelLayers(BaseModel(tiny).load(torch.float32, "cpu"), geometry, statistics)


def test_the_command_line_offers_every_method():
    assert tuple(METHODS) == METHOD_NAMES


@pytest.mark.parametrize("name", METHODS)
def test_planning_leaves_no_trace(name, layers):
    method = METHODS[name](layers.geometry, MethodOptions())
    before = dict(vars(method))
    measured = method.measure(0.5, layers, layers.statistics)
    budgets = [
        Budget(0.0),
        Budget(0.5),
        budget_of(0.5, layers.geometry, "int8"),
        Budget(0.8 if name == "kfac" else 0.6),
    ]
    plans = [method.plan(measured, budget) for budget in budgets]
    again = [method.plan(measured, budget) for budget in budgets[::-1]][::-1]
    assert [plan.layouts for plan in plans] == [plan.layouts for plan in again]
    assert [method.settings(plan) for plan in plans[1:]] == [
        method.settings(plan) for plan in again[1:]
    ]
    assert len({plan.layouts for plan in plans}) == len(plans)
    assert plans[2].latent_format(0) == LatentFormat("int8", 32)
    for layer in layers:
        assert method.factor(layer, plans[3]).layout == plans[3].layouts[layer.index]
    assert vars(method) == before


@pytest.mark.parametrize(
    ("method", "options", "most"),
    [
        (KfacBands, MethodOptions(), 0.85),
        (KfacBands, MethodOptions(allow_head_reordering=False), 0.85),
        (METHODS["kfac"], MethodOptions(), 0.85),
        (METHODS["kfac"], MethodOptions(spans="split"), 0.7),
    ],
)
def test_what_was_measured_at_another_compression_changes_nothing(layers, method, options, most):
    """Compressions at which heads come in different orders, forth and back."""
    method = method(layers.geometry, options)
    before, orders = None, set()
    for compression in (0.5, 0.6, most, 0.5):
        before = method.measure(compression, layers, layers.statistics, before)
        plan = method.plan(before, Budget(compression))
        assert plan == method.plan(method.measure(compression, layers, None), Budget(compression))
        orders.add(tuple(layer.head_order for layer in before[2]))
    assert len(orders) > 1 or not options.allow_head_reordering or options.spans == "split"


def test_layers_are_measured_once_for_every_order_of_heads(layers, monkeypatch):
    svds = []

    def svd(self, heads, which, svd=LayerMetric.svd):
        svds.append(heads)
        return svd(self, heads, which)

    monkeypatch.setattr(LayerMetric, "svd", svd)
    method = KfacBands(layers.geometry, MethodOptions(allow_head_reordering=False))
    measured = method.measure(0.5, layers, layers.statistics)
    assert len(svds) == len(layers) * (4 + 2 + 1)
    again = method.measure(0.8, layers, layers.statistics, measured)
    assert len(svds) == len(layers) * (4 + 2 + 1)
    assert again == measured


def test_plans_are_frozen(layers):
    method = METHODS["svd"](layers.geometry, MethodOptions())
    plan = method.plan(method.measure(0.5, layers, None), Budget(0.5))
    with pytest.raises(FrozenInstanceError):
        plan.spans = "joint"


def test_each_format_has_its_own_group_size(layers):
    """A plan for one latent format does not narrow the choice of the next."""
    free = METHODS["kfac"](layers.geometry, MethodOptions())
    measured = free.measure(0.5, layers, layers.statistics)
    for budget in (Budget(0.5), budget_of(0.75, layers.geometry, "int4")):
        plan = free.plan(measured, budget)
        losses = []
        for size in (1, 2, 4):
            fixed = METHODS["kfac"](layers.geometry, MethodOptions(k_group_size=size))
            only = fixed.measure(0.5, layers, layers.statistics)
            losses.append(fixed.plan(only, budget).expected_loss)
        assert plan.expected_loss == pytest.approx(min(losses), rel=1e-8)


@pytest.mark.parametrize(
    ("spans", "size", "target"),
    [
        *(("nested", size, target) for size in (2, 4) for target in ("cpu:1.2", "none")),
        *(("split", size, target) for size in (2, 4) for target in ("cpu:1.2", "none")),
        ("joint", 2, "cpu:2.5"),
        ("joint", 4, "none"),
    ],
)
def test_bands_within_both_budgets(layers, spans, size, target):
    geometry = layers.geometry
    options = MethodOptions(k_group_size=size, spans=spans, target=parse_target(target))
    method = KfacBands(geometry, options)
    method.check(0.7)
    measured = method.measure(0.7, layers, layers.statistics)
    losses = []
    for compression in (0.5, 0.7, 0.85):
        plan = method.plan(measured, Budget(compression))
        again = method.plan(measured, Budget(compression))
        assert plan == again
        stored = 0
        for layer, layout in zip(layers, plan.layouts, strict=True):
            layout.validate(geometry, spans)
            latent_format = plan.latent_format(layer.index)
            stored += latent_format.slot_bytes(layout.rank)
            factors = method.factor(layer, plan)
            shapes = layout.factor_shapes(geometry)
            for name, shape in shapes.items():
                assert tuple(getattr(factors, name).shape) == shape
        dense = 2 * geometry.dense_width * geometry.num_layers
        assert stored <= (1 - compression) * dense
        time, limit = method.decode_time(plan), method.target.limit_at(compression, coded=True)
        assert time is None if target == "none" else time <= limit
        losses.append(plan.expected_loss)
    assert losses == sorted(losses)


def test_expected_loss_of_bands_is_that_of_the_factors(layers):
    """With as many bits as there are, what is left is what was dropped."""
    geometry = layers.geometry
    method = KfacBands(geometry, MethodOptions(k_group_size=4, spans="joint"))
    plan = method.plan(method.measure(0.8, layers, layers.statistics), Budget(0.8))
    lost = 0.0
    for layer in layers:
        layout = plan.layouts[layer.index]
        metric = LayerMetric(layer, geometry.head_dim)
        (group,) = (layout.head_order,)
        svd = metric.svd(group, BOTH)
        lost += float(svd.squares[layout.rank :].sum())
        values, start = svd.squares.sqrt(), 0
        for band in layout.bands:
            blocks = values[start : start + band.columns].unflatten(0, (-1, BLOCK_COLUMNS))
            noise = blocks.sum(dim=1).square().sum() / BLOCK_COLUMNS
            lost += float(noise) * quantizer_error(band.bits)
            start += band.columns
    assert plan.expected_loss == pytest.approx(lost / 2)


@pytest.mark.parametrize("name", ["kfac", "bands"])
def test_where_nothing_is_fast_enough_groups_are_small(layers, name, caplog):
    kind = KfacBands if name == "bands" else METHODS[name]
    method = kind(layers.geometry, MethodOptions(target=Target("cpu", 0.01)))
    measured = method.measure(0.5, layers, layers.statistics)
    plan = method.plan(measured, Budget(0.5))
    free = kind(layers.geometry, MethodOptions(k_group_size=1))
    own = free.measure(0.5, layers, layers.statistics)
    assert plan.k_group_size == 1
    assert plan.expected_loss == pytest.approx(free.plan(own, Budget(0.5)).expected_loss)
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("--target cpu:0.01: no choice of spans decodes in 0.01 of")


def test_less_time_costs_accuracy(layers):
    losses, times, limit = [], [], 100.0
    for _ in range(3):
        method = METHODS["kfac"](layers.geometry, MethodOptions(target=Target("cpu", limit)))
        plan = method.plan(method.measure(0.5, layers, layers.statistics), Budget(0.5))
        losses.append(plan.expected_loss)
        times.append(method.decode_time(plan))
        assert times[-1] <= limit
        limit = 0.85 * times[-1]
    assert losses == sorted(losses)
    assert losses[0] < losses[-1]
    assert times[0] > times[-1]


def test_too_few_bytes_for_bands(layers):
    method = KfacBands(layers.geometry, MethodOptions(k_group_size=1))
    with pytest.raises(InputError, match=r"largest possible compression with these groups is 0\.8"):
        method.check(0.95)
