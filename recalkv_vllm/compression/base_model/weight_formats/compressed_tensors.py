"""Weights quantized by compressed-tensors: int4 and int8, fp8, with or without activations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from recalkv_vllm.compression.base_model.weight_formats.weight_format import (
    DENSE,
    WeightFormat,
    float_scales,
    module_of,
)
from recalkv_vllm.compression.errors import InputError


class CompressedTensors(WeightFormat):
    """The library's own decompression; activations that are quantized too stay as they are."""

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__(settings)
        sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
        refusals = {
            "kv_cache_scheme: latents take the place of the cache that it quantizes": (
                settings.get("kv_cache_scheme") is not None
            ),
            "transform_config: its weights are meant for transformed activations": bool(
                (settings.get("transform_config") or {}).get("config_groups")
            ),
            f"sparsity_config: sparse weights ({sparsity}) are not read": sparsity != "dense",
        }
        for message, refused in refusals.items():
            if refused:
                raise InputError(
                    f"quantization_config: {message}; expected a model quantized without"
                )

    def dense(
        self, directory: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer

        float_scales(tensors, ".weight_scale")
        # The library knows no classes here: it would look for the scales of embeddings too.
        quantized = {module_of(name) for name in tensors if name.endswith(".weight_scale")}
        plain = {module_of(name) for name in tensors if name.endswith(".weight")} - quantized
        return CompressedTensorsDequantizer(directory, ignore=plain, dtype=dtype).process(tensors)

    def with_dense_kv(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        ignored = [rf"re:.*\.self_attn\.{projection}$" for projection in DENSE]
        return {**self.settings, "ignore": [*(self.settings.get("ignore") or ()), *ignored]}
