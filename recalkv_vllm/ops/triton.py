"""The ops in Triton (``kernels/``), bound for torch tensors on NVIDIA GPUs.

On the CPU they run only in Triton's interpreter (``TRITON_INTERPRET=1``), for tests.
"""

from __future__ import annotations

import torch
import triton

from recalkv_vllm.kernels.bound import PagedLatentAttention
from recalkv_vllm.kernels.heuristics import target_of
from recalkv_vllm.kernels.launch import (
    INTERPRETED,
    cache_update_launch,
    value_up_launch,
)
from recalkv_vllm.latent_format import LatentFormat

__all__ = [
    "bind_paged_latent_attention",
    "describe",
    "latent_cache_update",
    "latent_value_up",
    "unsupported_reason",
]

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
    return f"Triton {triton.__version__}, {where}"


def latent_cache_update(
    z: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    latent_format: LatentFormat | None = None,
) -> None:
    """See :func:`recalkv_vllm.ops.reference.latent_cache_update`."""
    if slot_mapping.shape[0]:
        cache_update_launch(z, kv_cache, slot_mapping, latent_format).run()


bind_paged_latent_attention = PagedLatentAttention


def latent_value_up(
    o_lat: torch.Tensor,
    v_up: torch.Tensor,
    v_bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """See :func:`recalkv_vllm.ops.reference.latent_value_up`."""
    out = o_lat.new_empty(*o_lat.shape[:2], v_up.shape[1], dtype=out_dtype or v_up.dtype)
    if o_lat.shape[0]:
        value_up_launch(o_lat, v_up, v_bias, out).run()
    return out
