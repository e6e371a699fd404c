"""The ops in CUDA C++ (``csrc/cuda``), for decode on NVIDIA GPUs; the rest is Triton's.

Decode attention (up to 16 queries per sequence) runs here, by a kernel for Hopper or by one for all
devices, where that is faster than Triton's (:mod:`~.choice`). Prefill, cache update and the value
up-projection run the Triton kernels.
"""

from __future__ import annotations

import logging
import os

import torch

from recalkv_vllm.band_format import BandFormat
from recalkv_vllm.kernels import heuristics
from recalkv_vllm.ops.contract import KernelUnavailableError, LatentLayer
from recalkv_vllm.ops.cuda import extension
from recalkv_vllm.ops.cuda.attention import DecodeAttention
from recalkv_vllm.ops.cuda.hopper import HopperAttention
from recalkv_vllm.ops.cuda.layer import CudaLayer
from recalkv_vllm.ops.cuda.plan import HEAD_DIMS
from recalkv_vllm.ops.triton.attention import TritonAttention
from recalkv_vllm.ops.triton.layer import TritonLayer

__all__ = ["CudaLayer", "bind", "describe", "unsupported_reason"]

#: The compute capability of the kernel for Hopper, without the dot.
HOPPER_ARCH = 90

logger = logging.getLogger("recalkv_vllm.ops")


def unsupported_reason(
    device: torch.device, dtype: torch.dtype, head_dim: int | None
) -> str | None:
    """Why these kernels cannot run, or None."""
    if extension.load_error is not None:
        return f"the CUDA extension cannot be loaded ({extension.load_error})"
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
    arch = heuristics.target_of(device).arch
    faster = "" if os.environ.get("RECALKV_KERNEL") == "cuda" else " where it is the faster one"
    return f"CUDA C++ for decode{faster} on sm_{arch}, Triton for the rest"


def decode_attention(layer: LatentLayer) -> DecodeAttention:
    """The kernel for Hopper where it is the better one, else the one that all devices have.

    Raises:
        KernelUnavailableError: neither can serve the layer.
    """
    if heuristics.target_of(layer.k_up.device).arch == HOPPER_ARCH:
        coded = isinstance(layer.latent_format, BandFormat)
        try:
            if coded or layer.k_group_size == 1:
                return HopperAttention(layer)
        except KernelUnavailableError:
            if coded:
                raise  # the other kernel reads none
    return DecodeAttention(layer)


def bind(layer: LatentLayer) -> CudaLayer | TritonLayer:
    """Pack a layer's constants.

    Where the CUDA kernel cannot serve a layer Triton does, and the log says why.

    Raises:
        KernelUnavailableError: it cannot, and ``RECALKV_KERNEL=cuda`` forces it.
    """
    forced = os.environ.get("RECALKV_KERNEL") == "cuda"
    try:
        decode = decode_attention(layer)
    except KernelUnavailableError as error:
        if forced:
            raise KernelUnavailableError(f"RECALKV_KERNEL=cuda: {error}") from error
        logger.warning("recalkv: Triton instead of CUDA C++ for a layer: %s", error)
        return TritonLayer(layer)
    return CudaLayer(layer, decode, triton=None if forced else TritonAttention(layer))
