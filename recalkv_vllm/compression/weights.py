"""Weight files of a model directory: read by name, and copied with some tensors changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from recalkv_vllm.checkpoint import INDEX_FILE, WEIGHTS_FILE
from recalkv_vllm.compression.errors import InputError


def weight_files(directory: Path) -> list[Path]:
    """The files with a model's weights. Raises :class:`InputError` if one is missing."""
    index = directory / INDEX_FILE
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{index}: expected a weight_map, found none") from error
        files = [directory / name for name in sorted(names)]
    else:
        files = [directory / WEIGHTS_FILE]
    for path in files:
        if not path.is_file():
            raise InputError(f"{path}: no such file; expected the model's weights (safetensors)")
    return files


def read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a file, one at a time. Raises :class:`InputError` for a broken file."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no iterator of its own)
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all of a model's tensors by name, from the files' headers."""
    shapes = {}
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no iterator of its own)
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        except SafetensorError as error:
            raise InputError(f"{path}: not a readable safetensors file ({error})") from error
    return shapes


#: ``change(name, tensor)`` gives what stands in for a tensor: itself, others, or nothing.
Change = Callable[[str, torch.Tensor], Iterable[tuple[str, torch.Tensor]]]


def copy_weights(source: Path, directory: Path, change: Change) -> None:
    """Copy all weights of ``source`` file by file, each tensor as ``change`` says.

    An index is written for a single file too: without one, tools (vLLM's own classes among them)
    take every safetensors file of a directory for weights, the factors as well.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for path in weight_files(source):
        tensors = {
            new_name: new.contiguous()
            for name, tensor in read_tensors(path)
            for new_name, new in change(name, tensor)
        }
        # A single entry of metadata: several are written in an order that differs between runs.
        save_file(tensors, directory / path.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
