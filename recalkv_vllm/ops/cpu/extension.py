"""Loads the torch ops ``recalkv_cpu`` and says what they are under fake tensors."""

from __future__ import annotations

import importlib
from typing import Any

import torch


def _load() -> str | None:
    try:
        importlib.import_module("recalkv_vllm._cpu")
    except ImportError as error:
        return str(error)
    return None


#: Why the ops are not there, or None.
load_error = _load()

if load_error is None:

    @torch.library.register_fake("recalkv_cpu::latent_cache_update")
    def _(*_: object) -> None:
        """It writes into the cache that it is given and returns nothing."""

    @torch.library.register_fake("recalkv_cpu::latent_value_up")
    def _(
        o_lat: torch.Tensor,
        v_up: torch.Tensor,
        v_bias: torch.Tensor | None,
        out_dtype: torch.dtype,
        isa: str,
    ) -> torch.Tensor:
        return v_up.new_empty((*o_lat.shape[:2], v_up.shape[1]), dtype=out_dtype)

    @torch.library.register_fake("recalkv_cpu::paged_latent_attention_heads")
    def _(_: Any, q: torch.Tensor, *__: torch.Tensor) -> torch.Tensor:
        return q.new_empty(q.shape)

    @torch.library.register_fake("recalkv_cpu::paged_latent_attention")
    def _(layer: Any, q: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, heads = q.shape[:2]
        return (
            q.new_empty((tokens, heads, layer.v_width()), dtype=torch.float32),
            q.new_empty((tokens, heads), dtype=torch.float32),
        )
