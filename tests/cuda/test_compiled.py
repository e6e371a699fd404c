"""What nvcc made of the decode kernels, run on a machine for PTX, against the float64 oracle."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch

from recalkv_vllm.ops.cuda.attention import DecodeAttention
from recalkv_vllm.ops.cuda.hopper import HopperAttention
from tests.cuda import emulation
from tests.cuda.conftest import ON_GPU
from tests.cuda.test_hopper import LONG
from tests.ops.cases import build, spanned
from tests.ops.checks import assert_matches_oracle
from tests.ptx.block import Order
from tests.ptx.cuda_kernels import run_launch

pytestmark = [
    pytest.mark.skipif(ON_GPU, reason="the GPU runs them"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on the search path"),
]
BF16 = torch.bfloat16
CASES = {
    "hopper, plain": (HopperAttention, LONG["gqa"]),
    "hopper, key norm": (HopperAttention, LONG["joint"]),
    "hopper, bands": (HopperAttention, LONG["bands"]),
    "every device": (DecodeAttention, LONG["mha"]),
    "two heads": (DecodeAttention, spanned("two", (8, 4, 64), 2, 48, 1, 64, batch=((3, 90),))),
}


@pytest.mark.parametrize("order", [Order(0, early=False), Order(1, early=True)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_compiled_kernels(
    name: str,
    order: Order,
    cutting: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cutting(False)
    kernel, case = CASES[name]
    inputs = build(case, BF16, "cpu")
    layer = kernel(inputs.layer)
    shape = inputs.q.shape[:2]
    result = (torch.full((*shape, inputs.layer.v_width), torch.nan), torch.full(shape, torch.nan))
    op, given = layer.op, []

    def recorded(*arguments: object) -> None:
        given.extend(x for x in arguments if isinstance(x, torch.Tensor))
        op(*arguments)

    monkeypatch.setattr(kernel, "op", property(lambda _: recorded))
    with emulation.observed() as launches:
        layer.run(*inputs.call, *result)
    (launch,) = launches
    run_launch(launch, given, order)
    assert_matches_oracle(result, case, BF16)
