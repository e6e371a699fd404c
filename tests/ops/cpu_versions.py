"""Instruction sets of this processor that the C++ ops have versions for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from recalkv_vllm.ops import cpu  # noqa: F401  (loads the extension)
from tests.ops.cases import AttentionCase

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = [
    isa for isa in ("avx2", "avx512", "avx512_bf16") if torch.ops.recalkv_cpu.isa_supported(isa)
]
# The bf16 dot product is for bfloat16 alone.
VERSIONS = [
    (isa, dtype)
    for isa in ISAS
    for dtype in DTYPES
    if isa != "avx512_bf16" or dtype == torch.bfloat16
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
