"""The CUDA ops under fake tensors and in graphs, emulated where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from recalkv_vllm.ops import cuda
from recalkv_vllm.ops.cuda import extension
from tests.ops.cases import build, spanned
from tests.ops.checks import assert_matches_oracle
from tests.ops.replay import PADDED, GraphMemory
from tests.ops.tracing import RecordedCalls, ops_on_tensors

NAMESPACE = "recalkv_cuda"
DECODE, MERGE = f"{NAMESPACE}::decode", f"{NAMESPACE}::merge"
DEVICE = "cuda" if torch.cuda.is_available() and extension.load_error is None else "cpu"


@pytest.mark.parametrize(
    ("length", "names"), [(17, {DECODE}), (700, {DECODE, MERGE})], ids=["whole", "split"]
)
def test_ops(length: int, names: set[str], configure: Callable[[int, int], None]) -> None:
    case = spanned(
        "decode", (8, 2, 128), 2, 48, 1, 80, batch=((1, length),), key_bias=True, key_norm=True
    )
    inputs = build(case, torch.bfloat16, DEVICE)
    with RecordedCalls(NAMESPACE) as recorded:
        cuda.bind(inputs.layer).attend(*inputs.call)
    recorded.check(*names)


def test_every_op_has_a_test_here(configure: Callable[[int, int], None]) -> None:
    assert ops_on_tensors(NAMESPACE) == {DECODE, MERGE}


@pytest.mark.parametrize("name", PADDED)
def test_replayed_calls_serve_padded_batches(
    name: str, configure: Callable[[int, int], None]
) -> None:
    memory = GraphMemory(name, torch.bfloat16, DEVICE)
    layer = cuda.bind(memory.inputs.layer)
    with RecordedCalls(NAMESPACE) as graph:
        result = layer.attend(*memory.inputs.call)
    memory.show_batch()
    for output in result:
        output.fill_(torch.nan)
    for op, arguments in graph.calls:
        op(*arguments)
    assert_matches_oracle(result, memory.case, torch.bfloat16)
