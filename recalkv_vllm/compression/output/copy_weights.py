"""Copying a model's weights with some tensors changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from recalkv_vllm.checkpoint import INDEX_FILE
from recalkv_vllm.compression.base_model.weight_files import read_tensors, weight_files

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
