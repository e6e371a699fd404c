"""Which of the kernels' versions runs: the choice of an instruction set."""

from __future__ import annotations

import os

import torch

#: Dtypes of cache and queries.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def instruction_sets() -> list[str]:
    """Those of this processor that there are kernels for, in whatever dtype."""
    found = (isa for dtype in DTYPES for isa in torch.ops.recalkv_cpu.instruction_sets(dtype))
    return list(dict.fromkeys(found))


def instruction_set(dtype: torch.dtype) -> str:
    """Name of the instruction set that kernels for ``dtype`` use; empty if there is none.

    ``RECALKV_CPU_ISA`` forces one, unless that has kernels for other dtypes only.
    """
    available: list[str] = torch.ops.recalkv_cpu.instruction_sets(dtype)
    forced = os.environ.get("RECALKV_CPU_ISA")
    if forced and (forced in available or forced not in instruction_sets()):
        return forced
    return available[0] if available else ""
