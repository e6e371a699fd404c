"""Plans are values: made of measurements and a budget, whatever was planned before."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch

from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.calibration.statistics import collect
from recalkv_vllm.compression.factoring.factor_layers import ModelLayers
from recalkv_vllm.compression.latents.format_choice import budget_of
from recalkv_vllm.compression.methods import METHODS, MethodOptions
from recalkv_vllm.compression.plan import Budget
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
        budget_of(0.5, layers.geometry, LatentFormat("int8", 32)),
        Budget(0.8 if name == "kfac" else 0.6),
    ]
    plans = [method.plan(measured, budget) for budget in budgets]
    again = [method.plan(measured, budget) for budget in budgets[::-1]][::-1]
    assert [plan.layouts for plan in plans] == [plan.layouts for plan in again]
    assert [method.settings(plan) for plan in plans[1:]] == [
        method.settings(plan) for plan in again[1:]
    ]
    assert len({plan.layouts for plan in plans}) == len(plans)
    assert plans[2].latent_format == LatentFormat("int8", 32)
    for layer in layers:
        assert method.factor(layer, plans[3]).layout == plans[3].layouts[layer.index]
    assert vars(method) == before


def test_plans_are_frozen(layers):
    method = METHODS["svd"](layers.geometry, MethodOptions())
    plan = method.plan(method.measure(0.5, layers, None), Budget(0.5))
    with pytest.raises(FrozenInstanceError):
        plan.spans = "joint"


def test_each_format_has_its_own_group_size(layers):
    """A plan for one latent format does not narrow the choice of the next."""
    free = METHODS["kfac"](layers.geometry, MethodOptions())
    measured = free.measure(0.5, layers, layers.statistics)
    for budget in (Budget(0.5), budget_of(0.75, layers.geometry, LatentFormat("int4", 32))):
        plan = free.plan(measured, budget)
        losses = []
        for size in (1, 2, 4):
            fixed = METHODS["kfac"](layers.geometry, MethodOptions(k_group_size=size))
            only = fixed.measure(0.5, layers, layers.statistics)
            losses.append(fixed.plan(only, budget).expected_loss)
        assert plan.expected_loss == pytest.approx(min(losses), rel=1e-8)
