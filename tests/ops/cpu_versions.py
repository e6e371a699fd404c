"""Instruction sets of this processor that the C++ ops have versions for, and a model of AMX."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from recalkv_vllm.ops.cpu.plan import DTYPES
from tests.ops import amx_model
from tests.ops.cases import AttentionCase

if amx_model.compilable():
    amx_model.ensure_loaded()

#: Of an instruction set and a dtype that it has kernels for.
VERSIONS = [
    (isa, dtype) for dtype in DTYPES for isa in torch.ops.recalkv_cpu.instruction_sets(dtype)
]


def poison_free_memory(case: AttentionCase) -> None:
    """Leave NaN in what the allocator is likely to hand out next."""
    rows = sum(queries for queries, _ in case.batch) + case.padding_rows
    for width in (case.v_spans[0].width, 1):
        torch.full((rows * case.num_heads * width,), torch.nan)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch, and with it the ops, on ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
