"""What the time of a layer's decode kernels depends on, as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
import triton

from recalkv_vllm.ops.contract import LatentLayer
from recalkv_vllm.version import __version__


def layout_of(layer: LatentLayer) -> str:
    """All that two layers with equal kernels have in common: constants, and tensors but for their
    elements."""
    parts = {field.name: _kind(getattr(layer, field.name)) for field in fields(layer)}
    return "; ".join(f"{name} {kind}" for name, kind in parts.items())


def identity(device: torch.device, **parts: object) -> str:
    """A key of measured times: device, versions, and ``parts`` by their representation."""
    where = {"device": device_name(device), "versions": versions()}
    return json.dumps({**where, **{name: repr(part) for name, part in parts.items()}})


def device_name(device: torch.device) -> str:
    """Name and compute capability of a GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, {major}.{minor}"


def versions() -> Mapping[str, str]:
    """Of all that kernels are made by."""
    return {"recalkv": __version__, "torch": torch.__version__, "triton": triton.__version__}


def _kind(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return f"{value.dtype} {list(value.shape)}"
