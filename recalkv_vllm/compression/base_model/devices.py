"""Where and in which precision the calibration text runs through a model."""

from __future__ import annotations

import torch

from recalkv_vllm.compression.errors import InputError

#: ``--device`` for a model that no single device holds: layers go to the GPUs, what is left to
#: memory, what is left of that stays on disk.
SPREAD = "spread"


def choose_device(device: str) -> str:
    """``auto`` is a GPU if there is one. Raises :class:`InputError` for a device not there."""
    if device == SPREAD:
        return device
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {device}: not available ({str(error).splitlines()[0]})"
        ) from error
    return device


def single_device(device: str) -> str:
    """Where one layer at a time runs."""
    return choose_device("auto") if device == SPREAD else device


def calibration_dtype(own: torch.dtype, device: str) -> torch.dtype:
    """Precision of the calibration pass; sums over tokens are float32 everywhere.

    The model's own on a GPU. On a CPU bfloat16 for a bfloat16 model where the CPU multiplies in it
    (half the time; on SmolLM2 it moves second moments by 0.2 % and ranks' sensitivities by 1 % at
    most, less than another choice of text does), and float32 otherwise.
    """
    if not device.startswith("cpu"):
        return own
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if own == torch.bfloat16 and fast else torch.float32
