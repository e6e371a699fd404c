"""Loads the torch ops ``recalkv_cuda`` and says what they are under fake tensors."""

from __future__ import annotations

import importlib.util

import torch


def load_library(path: str) -> None:
    """Load the ops ``torch.ops.recalkv_cuda``.

    Raises:
        OSError: not a library that this torch can load.
    """
    torch.ops.load_library(path)

    @torch.library.register_fake("recalkv_cuda::decode")
    @torch.library.register_fake("recalkv_cuda::decode_hopper")
    def _(*_: object) -> None:
        """They write into tensors that they are given and return nothing."""


def _load() -> str | None:
    spec = importlib.util.find_spec("recalkv_vllm._cuda")
    if spec is None or spec.origin is None:
        return "not built; 'pip install --no-build-isolation -e .' builds it with nvcc"
    try:
        load_library(spec.origin)
    except OSError as error:
        return str(error)
    return None


#: Why the ops are not there, or None.
load_error = _load()
