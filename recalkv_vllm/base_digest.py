"""Tells revisions of a base model apart: factors alone must meet the weights they were made of.

The offline tool records the digest beside factors without a model; the server compares it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from recalkv_vllm.architectures import language_name
from recalkv_vllm.checkpoint import INDEX_FILE, WEIGHTS_FILE, CheckpointError

#: Key of ``config.json`` beside factors without a model.
DIGEST_KEY = "recalkv_base_digest"


def base_digest(find: Callable[[str], Path | None], layers: Sequence[int]) -> str:
    """Digest of the key and value projections of the first and the last layer, as stored.

    Args:
        find: path of one of the model's files by its name; None if there is no such file.
        layers: with attention, by their index in the decoder.

    Raises:
        CheckpointError: no such weights.
    """
    pattern = rf"model\.layers\.({layers[0]}|{layers[-1]})\.self_attn\.(k|v|qkv)_proj\.\w+"

    def wanted(name: str) -> bool:
        return re.fullmatch(pattern, language_name(name)) is not None

    index = find(INDEX_FILE)
    if index is None:
        files = {WEIGHTS_FILE}
    else:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {file for name, file in weight_map.items() if wanted(name)}
    parts = {}
    for file in files:
        path = find(file)
        if path is None:
            raise CheckpointError(f"{file}: no such file; expected the base model's weights")
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in filter(wanted, tensors.keys()):
                    data = tensors.get_tensor(name).contiguous().flatten().view(torch.uint8)
                    parts[name] = hashlib.blake2b(data.numpy(), digest_size=16).hexdigest()
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    if not parts:
        raise CheckpointError(f"{pattern}: expected such weights in the base model")
    return hashlib.blake2b(json.dumps(sorted(parts.items())).encode(), digest_size=16).hexdigest()


def local_files(directory: Path) -> Callable[[str], Path | None]:
    """``find`` of :func:`base_digest` for a model directory."""
    return lambda name: directory / name if (directory / name).is_file() else None
