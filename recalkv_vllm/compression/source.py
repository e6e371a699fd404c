"""Base models: found, checked and loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from recalkv_vllm.checkpoint import CONFIG_FILE, read_hf_config
from recalkv_vllm.compression.architectures import FUSED, CausalLM, split_fused_projections
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.quantised import Quantisation, quantisation_of
from recalkv_vllm.compression.weights import read_tensors, weight_files

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
#: ``--device`` for a model that no single device holds: layers go to the GPUs, what is left to
#: memory, what is left of that stays on disk.
SPREAD = "spread"
#: How ``accelerate`` does so.
DEVICE_MAP = "auto"
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


def load_model(directory: Path, dtype: torch.dtype, device: str) -> CausalLM:
    """Load a causal language model, without dropout, from safetensors only.

    Quantised weights are loaded in their dense form, so that they give gradients; activations that
    the model quantises are not quantised here.

    Args:
        directory: of the model.
        dtype: of its weights.
        device: where to put it, or :data:`SPREAD`.

    Raises:
        InputError: missing or broken weights, quantised ones without a dense form, or weights that
            cannot be spread.
    """
    base_config = read_hf_config(directory)
    quantisation = quantisation_of(base_config)
    spread = device == SPREAD
    if spread and (quantisation is not None or base_config["model_type"] in FUSED):
        raise InputError(
            f"--device {SPREAD}: model {directory}: expected weights that are neither fused nor "
            "quantised; name one device"
        )
    # Activation checkpointing needs training mode, in which dropout must not act.
    options: dict[str, Any] = {"local_files_only": True, "attention_dropout": 0.0}
    if spread:
        options["device_map"] = DEVICE_MAP
    try:
        if quantisation is None:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
        else:
            loaded = _load_dense_form(directory, quantisation, dtype, options)
    except Exception as error:  # safetensors, JSON and shape errors all have classes of their own
        reason = str(error).strip().splitlines()[0]
        if isinstance(error, KeyError):  # a part of a quantised weight
            reason += " is missing"
        raise InputError(f"model {directory}: cannot be loaded ({reason})") from error
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"model {directory}: cannot be loaded ({missing[0]} is missing)")
    split_fused_projections(model)
    return model if spread else model.to(device)


def _load_dense_form(
    directory: Path, quantisation: Quantisation, dtype: torch.dtype, options: dict[str, Any]
) -> Any:
    """What ``from_pretrained`` gives of the same model before it was quantised."""
    config = AutoConfig.from_pretrained(directory, **options)
    del config.quantization_config
    with torch.device("meta"):
        model_class: Any = type(AutoModelForCausalLM.from_config(config))
    tensors = {n: t for path in weight_files(directory) for n, t in read_tensors(path)}
    tensors = quantisation.dense(directory, tensors, dtype)
    # What else a quantised model has (scales of activations) is no parameter.
    parameters = {n: t for n, t in tensors.items() if n.endswith((".weight", ".bias"))}
    for name, tensor in parameters.items():
        if tensor.dtype not in DTYPES.values():
            raise ValueError(f"{name}: no scale for its {tensor.dtype} numbers")
    return model_class.from_pretrained(
        None, config=config, dtype=dtype, state_dict=parameters, output_loading_info=True
    )


def load_tokenizer(directory: Path):
    """Load a model's tokenizer. Raises :class:`InputError` where there is none."""
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model {directory}: no usable tokenizer ({reason})") from error


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


def own_dtype(directory: Path) -> torch.dtype:
    """The dtype a model's configuration names; float32 if none."""
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    return config.dtype or torch.float32
