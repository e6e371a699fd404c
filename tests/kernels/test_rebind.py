"""New constants for a bound layer, whose old ones captured graphs hold."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from recalkv_vllm.ops import LatentLayer, bind
from recalkv_vllm.ops.checked import CheckedLayer
from recalkv_vllm.ops.triton.launch import Launch
from recalkv_vllm.ops.triton.plan import Part
from tests.e2e.pretend_sleep import NotedMemory
from tests.ops.band_cases import banded
from tests.ops.cases import build, joint, spanned
from tests.ops.replay import GraphMemory

BATCH = ((1, 45),)
LAYERS = {
    "plain": spanned(
        "plain", (8, 2, 64), 2, 48, 1, 80, batch=BATCH, key_bias=True, key_norm=True, sinks=True
    ),
    "bands": banded(joint("bands", (4, 2, 64), 1, 64, batch=BATCH), *[((64, 4),)] * 2),
}


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECALKV_KERNEL", "triton")


def with_other_elements(layer: LatentLayer) -> LatentLayer:
    """The layer with other weights, in memory of their own."""
    weights = ("k_up", "v_up", "k_bias", "v_bias", "k_norm_weight", "sinks")
    old = {name: getattr(layer, name) for name in weights}
    return replace(layer, **{name: x.flip(-1) for name, x in old.items() if x is not None})


def captured(bound: CheckedLayer, memory: GraphMemory, heads: torch.Tensor) -> list[Launch]:
    """The launches of a decode into ``heads``, as a graph holds them."""
    ops: Any = bound._bound
    q, kv_cache, batch = memory.inputs.call
    part = Part.decodes(batch)
    return list(ops.attention.head_launches(part, q, kv_cache, batch, ops.values, heads))


def test_captured_launches_compute_with_the_new_weights() -> None:
    memory = GraphMemory("decode", torch.float32, "cpu")
    bound, heads = bind(memory.inputs.layer), torch.empty_like(memory.inputs.q)
    launches = captured(bound, memory, heads)
    newer = with_other_elements(memory.inputs.layer)
    memory.show_batch()
    before = bound.attend_heads(*memory.inputs.call)
    bound.rebind(newer, captured=True)
    for launch in launches:
        launch.run()
    assert heads.equal(bind(newer).attend_heads(*memory.inputs.call))
    assert not heads.equal(before)


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("in_place", [True, False])
def test_a_rebound_layer_is_the_new_one(case, in_place) -> None:
    inputs = build(case, torch.float32)
    newer = with_other_elements(inputs.layer)
    bound = bind(inputs.layer)
    bound.rebind(newer, captured=in_place)
    assert bound.attend_heads(*inputs.call).equal(bind(newer).attend_heads(*inputs.call))


def test_what_graphs_would_not_see_is_refused_and_changes_nothing() -> None:
    inputs = build(LAYERS["plain"], torch.float32)
    before = bind(inputs.layer).attend_heads(*inputs.call)
    bound = bind(inputs.layer)
    newer = replace(with_other_elements(inputs.layer), scale=3.0)
    with pytest.raises(ValueError, match=r"scale: expected .*, found 3\.0"):
        bound.rebind(newer, captured=True)
    assert bound.attend_heads(*inputs.call).equal(before)


def test_every_tensor_of_a_layer_is_looked_at() -> None:
    """Whatever a layer may have, a change of it reaches its calls."""
    inputs = build(LAYERS["plain"], torch.float32)
    given = {
        f.name
        for f in fields(inputs.layer)
        if isinstance(getattr(inputs.layer, f.name), torch.Tensor)
    }
    for name in given - {"cos_sin_cache"}:
        newer = replace(inputs.layer, **{name: getattr(inputs.layer, name) * 1.5})
        bound = bind(build(LAYERS["plain"], torch.float32).layer)
        bound.rebind(newer, captured=True)
        result = bound.attend_heads(*inputs.call)
        assert result.equal(bind(newer).attend_heads(*inputs.call)), name
        assert not result.equal(bind(inputs.layer).attend_heads(*inputs.call)), name


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS.keys())
def test_all_that_a_layer_keeps_is_made_anew_after_its_memory_was_lost(case) -> None:
    """As at level 2 of sleep: buffers come back, weights by a reload, and nothing else does."""
    inputs = build(case, torch.float32)
    memory = NotedMemory()
    with memory.use_memory_pool("weights"):
        given = {
            f.name: x.clone()
            for f in fields(inputs.layer)
            if isinstance(x := getattr(inputs.layer, f.name), torch.Tensor)
        }
        bound = bind(replace(inputs.layer, **given))
    before = bound.attend_heads(*inputs.call)
    memory.sleep(offload_tags=("weights",))
    memory.wake_up()
    assert bound.attend_heads(*inputs.call).equal(before)
    memory.sleep(offload_tags=())
    for name, tensor in given.items():
        tensor.copy_(getattr(inputs.layer, name))
    assert not bound.attend_heads(*inputs.call).equal(before)
    bound.rebind(replace(inputs.layer, **given), captured=True)
    assert bound.attend_heads(*inputs.call).equal(before)
