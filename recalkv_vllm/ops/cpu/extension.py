"""Loads the torch ops ``recalkv_cpu`` and says what they are under fake tensors."""

from __future__ import annotations

import importlib
import importlib.util
import mmap
import re
from pathlib import Path
from typing import Any

import torch

#: ``csrc/cpu/bindings.cpp`` has it, followed by the version.
BUILT_AGAINST = rb"recalkv_vllm: built against torch ([\d.]+)"


def torch_at_build(library: Path) -> str | None:
    """The release of torch that the extension was built against, such as ``"2.13.0"``.

    Torch's C++ ABI is that of one release: with another, the library may not load, or crash.

    Returns:
        The release, or None: a library of an older version of this package.
    """
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = re.search(BUILT_AGAINST, data)
        return found[1].decode() if found else None


def _load() -> str | None:
    spec = importlib.util.find_spec("recalkv_vllm._cpu")
    if spec is None or spec.origin is None:
        return "not built; it takes a C++20 compiler"
    built = torch_at_build(Path(spec.origin))
    release = re.match(r"[\d.]*\d", torch.__version__)
    if release is None or built != release[0]:
        return f"built against torch {built or 'unknown'}, found torch {torch.__version__}"
    try:
        importlib.import_module("recalkv_vllm._cpu")
    except ImportError as error:
        return str(error)
    return None


#: Why the ops are not there, or None.
load_error = _load()

if load_error is None:

    @torch.library.register_fake("recalkv_cpu::latent_cache_update")
    @torch.library.register_fake("recalkv_cpu::paged_latent_attention_heads")
    def _(*_: object) -> None:
        """They write into a tensor that they are given and return nothing."""

    @torch.library.register_fake("recalkv_cpu::latent_value_up")
    def _(
        o_lat: torch.Tensor,
        v_up: torch.Tensor,
        v_bias: torch.Tensor | None,
        out_dtype: torch.dtype,
        isa: str,
    ) -> torch.Tensor:
        return v_up.new_empty((*o_lat.shape[:2], v_up.shape[1]), dtype=out_dtype)

    @torch.library.register_fake("recalkv_cpu::paged_latent_attention")
    def _(layer: Any, q: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, heads = q.shape[:2]
        return (
            q.new_empty((tokens, heads, layer.v_width()), dtype=torch.float32),
            q.new_empty((tokens, heads), dtype=torch.float32),
        )
