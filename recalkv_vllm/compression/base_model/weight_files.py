"""Weight files of a model directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from recalkv_vllm.checkpoint import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
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


def content_digest(directory: Path) -> str:
    """Digest of a model's weights and configuration (hex)."""
    digest = hashlib.blake2b(digest_size=16)
    for path in [directory / CONFIG_FILE, *sorted(directory.glob("*.safetensors"))]:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()
