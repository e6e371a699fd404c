"""The ops in Triton (``kernels/``), bound for torch tensors on NVIDIA GPUs.

On the CPU they run only in Triton's interpreter (``TRITON_INTERPRET=1``), for tests.
"""

from __future__ import annotations

import torch
import triton

from recalkv_vllm.kernels.heuristics import target_of
from recalkv_vllm.ops.contract import LatentLayer
from recalkv_vllm.ops.triton.launch import INTERPRETED
from recalkv_vllm.ops.triton.layer import TritonLayer

__all__ = ["TritonLayer", "bind", "describe", "unsupported_reason"]

LARGEST_HEAD_DIM = 256
OLDEST_ARCH = 80


def unsupported_reason(
    device: torch.device, dtype: torch.dtype, head_dim: int | None
) -> str | None:
    """Why these kernels cannot run, or None."""
    if device.type != "cuda" and not INTERPRETED:
        return f"expected a CUDA device (or TRITON_INTERPRET=1), found {device}"
    if device.type == "cuda" and (arch := target_of(device).arch) < OLDEST_ARCH:
        return f"expected compute capability {OLDEST_ARCH} or newer, found {arch}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"expected float32, bfloat16 or float16, found {dtype}"
    if head_dim is not None and (head_dim % 2 or not 0 < head_dim <= LARGEST_HEAD_DIM):
        return f"expected an even head size up to {LARGEST_HEAD_DIM}, found {head_dim}"
    return None


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """Triton's version and the architecture, for the log."""
    where = f"sm_{target_of(device).arch}" if device.type == "cuda" else "interpreted"
    slow = device.type == "cuda" and dtype == torch.float32
    note = "; float32 does without tensor cores and is slow, serve in bfloat16" if slow else ""
    return f"Triton {triton.__version__}, {where}{note}"


def bind(layer: LatentLayer) -> TritonLayer:
    """Pack a layer's constants."""
    return TritonLayer(layer)
