"""The CUDA ops under fake tensors and in graphs, emulated where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from recalkv_vllm.kernels import heuristics
from recalkv_vllm.kernels.heuristics import Target
from recalkv_vllm.ops import BatchLimits, cuda
from recalkv_vllm.ops.cuda import extension
from recalkv_vllm.ops.cuda.shapes import KernelShape
from recalkv_vllm.ops.overwrite import overwrite
from recalkv_vllm.ops.triton.launch import Launch
from tests.ops.band_cases import banded
from tests.ops.cases import build, joint, spanned
from tests.ops.checks import assert_matches_oracle
from tests.ops.replay import PADDED, GraphMemory
from tests.ops.tracing import RecordedCalls, ops_on_tensors

NAMESPACE = "recalkv_cuda"
DECODE, HOPPER = f"{NAMESPACE}::decode", f"{NAMESPACE}::decode_hopper"
DEVICE = "cuda" if torch.cuda.is_available() and extension.load_error is None else "cpu"


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_ops(cut: bool, cutting: Callable[[bool], None]) -> None:
    cutting(cut)
    case = spanned(
        "decode", (8, 2, 128), 2, 48, 1, 80, batch=((1, 700),), key_bias=True, key_norm=True
    )
    inputs = build(case, torch.bfloat16, DEVICE)
    with RecordedCalls(NAMESPACE) as recorded:
        cuda.bind(inputs.layer).attend(*inputs.call)
    recorded.check(DECODE)


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("coded", [False, True])
def test_ops_on_hopper(
    coded: bool, cut: bool, cutting: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cutting(cut)
    monkeypatch.setattr(heuristics, "target_of", lambda device: Target(90, 132))
    case = joint("decode", (8, 2, 128), 1, 96, batch=((1, 700),), key_norm=True)
    if coded:
        case = banded(case, *[((32, 6), (64, 4))] * 2)
    inputs = build(case, torch.bfloat16, DEVICE)
    with RecordedCalls(NAMESPACE) as recorded:
        cuda.bind(inputs.layer).attend(*inputs.call)
    recorded.check(HOPPER)


def test_every_op_has_a_test_here(configure: Callable[[int, int], None]) -> None:
    assert ops_on_tensors(NAMESPACE) == {DECODE, HOPPER}


@pytest.mark.parametrize("heads", [(8, 2, 128), (16, 1, 64)], ids=str)
def test_warming_up_runs_every_kernel_that_decodes_reach(
    heads: tuple[int, int, int], configure: Callable[[int, int], None]
) -> None:
    """CUDA loads a kernel when it is first called: which one that is follows from the plan."""

    def kernels(calls: list[tuple[Any, tuple]]) -> set[Any]:
        loaded = set()
        for op, arguments in calls:
            shape = KernelShape(*arguments[15]) if op._schema.name == DECODE else None
            loaded.add(shape and (shape.column_tiles, shape.v_tiles, shape.resident))
        return loaded

    batches = [((1, 17),), ((1, 700),), ((4, 60),), ((16, 100), (9, 300))]
    inputs = [
        build(spanned("decode", heads, 1, 48, 1, 80, batch=batch), torch.bfloat16, DEVICE)
        for batch in batches
    ]
    layer = cuda.bind(inputs[0].layer)
    with RecordedCalls(NAMESPACE) as warm:
        layer.warm_up(inputs[0].kv_cache, BatchLimits(heads[0], 8, 4, 2048, 64))
    with RecordedCalls(NAMESPACE) as asked:
        for each in inputs:
            layer.attend(*each.call)
    assert kernels(asked.calls) == kernels(warm.calls)


@pytest.mark.parametrize("name", PADDED)
def test_replayed_calls_serve_padded_batches(
    name: str, configure: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's launches among them, which cut the batch and merge its pieces."""
    memory = GraphMemory(name, torch.bfloat16, DEVICE)
    layer = cuda.bind(memory.inputs.layer)
    graph: list[Callable[[], object]] = []
    run, decode = Launch.run, layer.decode._start
    monkeypatch.setattr(Launch, "run", lambda self: (graph.append(partial(run, self)), run(self)))
    monkeypatch.setattr(
        layer.decode, "_start", lambda *call: (graph.append(partial(decode, *call)), decode(*call))
    )
    result = layer.attend(*memory.inputs.call)
    captured = tuple(graph)
    assert len(captured) == 3
    memory.show_batch()
    for output in result:
        output.fill_(torch.nan)
    for call in captured:
        call()
    assert_matches_oracle(result, memory.case, torch.bfloat16)


@pytest.mark.parametrize("arch", [80, 90])
def test_replayed_calls_see_the_weights_that_a_layer_is_bound_to_anew(
    arch: int, configure: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heuristics, "target_of", lambda device: Target(arch, 132))
    case = joint("decode", (8, 2, 128), 1, 96, batch=((1, 17),))
    inputs = build(case, torch.bfloat16, DEVICE)
    layer = cuda.bind(inputs.layer)
    with RecordedCalls(NAMESPACE) as graph:
        result = layer.attend(*inputs.call)
    newer = replace(inputs.layer, k_up=inputs.layer.k_up.flip(1))
    expected = cuda.bind(newer).attend(*inputs.call)
    assert not result[1].equal(expected[1])
    overwrite(layer, cuda.bind(newer))
    for op, arguments in graph.calls:
        op(*arguments)
    assert result[1].equal(expected[1])
    assert result[0].equal(expected[0])
