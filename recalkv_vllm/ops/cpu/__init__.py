"""The ops in C++ (``csrc/cpu``), bound for torch tensors on the CPU.

``RECALKV_CPU_ISA=avx2|avx512|avx512_bf16|amx_bf16`` forces an instruction set.
"""

from __future__ import annotations

import torch

from recalkv_vllm.ops.contract import LatentLayer
from recalkv_vllm.ops.cpu import extension
from recalkv_vllm.ops.cpu.attention import CpuLayer
from recalkv_vllm.ops.cpu.plan import DTYPES, instruction_set, instruction_sets

__all__ = ["CpuLayer", "bind", "describe", "unsupported_reason"]

LARGEST_HEAD_DIM = 256


def unsupported_reason(
    device: torch.device, dtype: torch.dtype, head_dim: int | None
) -> str | None:
    """Why these kernels cannot run, or None."""
    if extension.load_error is not None:
        return (
            f"the C++ extension cannot be loaded ({extension.load_error}); install again with "
            "'pip install --no-build-isolation --no-cache-dir', or set RECALKV_KERNEL=reference, "
            "which is slow"
        )
    if device.type != "cpu":
        return f"expected a tensor on the CPU, found {device}"
    if dtype not in DTYPES:
        return f"expected float32, bfloat16 or float16, found {dtype}"
    isa = instruction_set(dtype)
    if not isa:
        return "expected a processor with AVX2, FMA and F16C"
    if isa not in (available := instruction_sets()):
        return f"RECALKV_CPU_ISA: expected one of {', '.join(available)}, found {isa!r}"
    if head_dim is not None and (head_dim % 16 or not 0 < head_dim <= LARGEST_HEAD_DIM):
        return f"expected a head size in multiples of 16 up to {LARGEST_HEAD_DIM}, found {head_dim}"
    return None


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """Instruction set and threads, for the log."""
    return f"C++ {instruction_set(dtype)}, {torch.get_num_threads()} threads"


def bind(layer: LatentLayer) -> CpuLayer:
    """Pack a layer's constants for the best instruction set."""
    return CpuLayer(layer)
