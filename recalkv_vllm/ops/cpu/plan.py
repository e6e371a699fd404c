"""Which of the kernels' versions runs: the choice of an instruction set."""

from __future__ import annotations

import os

import torch


def instruction_set(dtype: torch.dtype) -> str:
    """Name of the instruction set that kernels for ``dtype`` use; empty if there is none."""
    forced = os.environ.get("RECALKV_CPU_ISA")
    best: str = torch.ops.recalkv_cpu.best_isa(dtype)
    if not forced:
        return best
    # The bf16 dot product is for bf16 alone; other dtypes then use what comes next.
    return best if forced == "avx512_bf16" and dtype != torch.bfloat16 else forced
