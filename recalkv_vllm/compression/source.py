"""Base models: found, checked and loaded."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from recalkv_vllm.checkpoint import CONFIG_FILE
from recalkv_vllm.compression.architectures import CausalLM, split_fused_projections
from recalkv_vllm.compression.errors import InputError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def find_model(model: str) -> Path:
    """The directory of a model given as a directory or as a hub name ``owner/name``.

    Raises:
        InputError: neither, a directory without ``config.json``, or an unreachable hub.
    """
    directory = Path(model)
    if directory.is_dir():
        if not (directory / CONFIG_FILE).is_file():
            raise InputError(f"model {model}: no {CONFIG_FILE} in it; expected a model directory")
        return directory
    if directory.exists():
        raise InputError(f"model {model}: is a file; expected a model directory")
    if not HUB_NAME.fullmatch(model):
        raise InputError(
            f"model {model}: no such directory; expected a model directory or a hub name owner/name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model, allow_patterns=["*.json", "*.jinja", "*.model", "*.safetensors"]
            )
        )
    except Exception as error:  # the hub's client raises whatever its transport raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(
            f"model {model}: no such directory, and the hub gave no such model ({reason})"
        ) from error


def load_model(directory: Path, dtype: torch.dtype | str, device: str) -> CausalLM:
    """Load a causal language model, without dropout, from safetensors only.

    Args:
        directory: of the model.
        dtype: a torch dtype, or ``auto`` for the model's own.
        device: where to put it.

    Raises:
        InputError: missing or broken weights.
    """
    # Activation checkpointing needs training mode, in which dropout must not act.
    options = {"attention_dropout": 0.0, "use_safetensors": True, "local_files_only": True}
    try:
        model: CausalLM = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options)
    except Exception as error:  # safetensors, JSON and shape errors all have classes of their own
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model {directory}: cannot be loaded ({reason})") from error
    split_fused_projections(model)
    return model.to(device)


def load_tokenizer(directory: Path):
    """Load a model's tokenizer. Raises :class:`InputError` where there is none."""
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model {directory}: no usable tokenizer ({reason})") from error


def choose_device(device: str) -> str:
    """``auto`` is a GPU if there is one. Raises :class:`InputError` for a device not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {device}: not available ({str(error).splitlines()[0]})"
        ) from error
    return device


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


def own_dtype(directory: Path) -> torch.dtype:
    """The dtype a model's configuration names; float32 if none."""
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    return config.dtype or torch.float32
