"""What is compared end to end: the stock model and checkpoints made from it, run alike."""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from recalkv_vllm.checkpoint import RecalkvConfig, read_hf_config
from recalkv_vllm.compression.errors import InputError

RESULT = "result.json"
STOCK = "stock"


def systems(options: argparse.Namespace) -> dict[str, tuple[str, list[str]]]:
    """Model and options of vLLM that only it gets, by name; the stock model first.

    Raises:
        InputError: no base model, or checkpoints that names do not tell apart.
    """
    found: dict[str, tuple[str, list[str]]] = {}
    for path in options.checkpoint:
        recalkv = RecalkvConfig.from_hf_config(read_hf_config(path), str(path / "config.json"))
        base = options.base or recalkv.settings.get("base_model")
        if not found:
            if base is None or not (Path(base).is_dir() or "/" in base):
                raise InputError(
                    f"--base: expected the directory or hub name of the model that {path} was made "
                    f"from, found {base!r}"
                )
            found[STOCK] = (str(base), [])
        found[path.resolve().name] = (str(path), ["--attention-backend", "recalkv"])
    if len(found) <= len(options.checkpoint):
        raise InputError(f"CHECKPOINT: expected directories of different names, none named {STOCK}")
    return found


def engine_arguments(options: argparse.Namespace) -> list[str]:
    """Options of vLLM that all systems get."""
    args = ["--kv-cache-memory-bytes", str(options.kv_cache_memory_bytes)]
    args += ["--max-model-len", str(options.max_model_len), "--dtype", options.dtype]
    # Compilation on a CPU costs minutes of start-up and changes attention's share little.
    return args if torch.cuda.is_available() else [*args, "--enforce-eager"]


def require_positive(**counts: int) -> None:
    """Raise :class:`InputError` for an option (``max_model_len=0``) that is below 1."""
    for name, value in counts.items():
        if value < 1:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag}: expected at least 1, found {value}")


def new_result(options: argparse.Namespace) -> dict[str, Any]:
    """A result without rows: how, with what and on what it is measured."""
    machine = f"{torch.get_num_threads()} threads, {platform.machine()}"
    return {
        "partial": True,
        "kv_cache_memory_bytes": options.kv_cache_memory_bytes,
        "rounds": options.rounds,
        "versions": {name: version(name) for name in ("vllm", "torch", "recalkv-vllm")},
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else machine,
        "rows": [],
    }


def write(directory: Path, result: dict[str, Any]) -> None:
    """Write ``result.json``."""
    (directory / RESULT).write_text(json.dumps(result, indent=1))
