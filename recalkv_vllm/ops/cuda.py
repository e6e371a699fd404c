"""The ops in CUDA C++ (``csrc/cuda``), for decode on NVIDIA GPUs; the rest is Triton's.

Decode attention (up to 16 queries per sequence) runs here; prefill, cache update and the value
up-projection run the Triton kernels.
"""

from __future__ import annotations

import importlib.util
import logging
import os

import torch

from recalkv_vllm.ops import triton
from recalkv_vllm.ops.cuda_attention import CudaAttention, DecodeAttention
from recalkv_vllm.ops.cuda_plan import HEAD_DIMS
from recalkv_vllm.ops.dispatch import BoundAttention, KernelUnavailableError
from recalkv_vllm.ops.layer import LatentLayer
from recalkv_vllm.ops.triton import latent_cache_update, latent_value_up

__all__ = [
    "bind_paged_latent_attention",
    "describe",
    "latent_cache_update",
    "latent_value_up",
    "unsupported_reason",
]

logger = logging.getLogger("recalkv_vllm.ops")


def load_library(path: str) -> None:
    """Load the ops ``torch.ops.recalkv_cuda`` and say what they are under fake tensors.

    Raises:
        OSError: not a library that this torch can load.
    """
    torch.ops.load_library(path)

    @torch.library.register_fake("recalkv_cuda::decode")
    @torch.library.register_fake("recalkv_cuda::merge")
    def _(*_: object) -> None:
        """They write into tensors that they are given and return nothing."""


def _load_extension() -> str | None:
    """Load the kernels' library; returns why that failed."""
    spec = importlib.util.find_spec("recalkv_vllm._cuda")
    if spec is None or spec.origin is None:
        return "not built; 'pip install --no-build-isolation -e .' builds it with nvcc"
    try:
        load_library(spec.origin)
    except OSError as error:
        return str(error)
    return None


#: Why the kernels' library is not here, or None.
load_error = _load_extension()


def unsupported_reason(
    device: torch.device, dtype: torch.dtype, head_dim: int | None
) -> str | None:
    """Why these kernels cannot run, or None."""
    if load_error is not None:
        return f"the CUDA extension cannot be loaded ({load_error})"
    if device.type != "cuda":
        return f"expected a CUDA device, found {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"expected compute capability 8.0 or newer, found {major}.{minor}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"expected bfloat16 or float16, found {dtype}"
    if head_dim is not None and head_dim not in HEAD_DIMS:
        return f"expected a head size of {', '.join(map(str, HEAD_DIMS))}, found {head_dim}"
    return None


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """The architecture, for the log."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"CUDA C++ for decode on sm_{major}{minor}, Triton for prefill"


def bind_paged_latent_attention(layer: LatentLayer) -> BoundAttention:
    """Pack a layer's factors; see :func:`recalkv_vllm.ops.reference.paged_latent_attention`.

    Where the CUDA kernel cannot serve a layer Triton does, and the log says why.

    Raises:
        KernelUnavailableError: it cannot, and ``RECALKV_KERNEL=cuda`` forces it.
    """
    forced = os.environ.get("RECALKV_KERNEL") == "cuda"
    try:
        decode = DecodeAttention(layer)
    except KernelUnavailableError as error:
        if forced:
            raise KernelUnavailableError(f"RECALKV_KERNEL=cuda: {error}") from error
        logger.warning("recalkv: Triton instead of CUDA C++ for a layer: %s", error)
        return triton.bind_paged_latent_attention(layer)
    prefill = None
    if not forced:
        prefill = triton.bind_paged_latent_attention(layer)
    return CudaAttention(decode, prefill)
