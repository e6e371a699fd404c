"""Weights quantized by AutoAWQ (arXiv 2306.00978): 4 bits, packed along the output axis."""

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


class Awq(WeightFormat):
    """Converted to compressed-tensors, and decompressed, by that library."""

    def __init__(self, settings: Mapping[str, Any]):
        from compressed_tensors.entrypoints.convert import AutoAWQConverter

        super().__init__(settings)
        try:
            self._converter = AutoAWQConverter.from_autoawq_config(dict(settings))
            self._scheme = self._converter.create_config().config_groups["config_group_0"]
        except ValueError as error:
            raise InputError(f"quantization_config: {str(error).splitlines()[0]}") from error

    def dense(
        self, directory: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        from compressed_tensors.compressors import PackedQuantizationCompressor as Packed

        float_scales(tensors, ".scales")
        tensors = self._converter.process(tensors)
        for name in [name for name in tensors if name.endswith(".weight_packed")]:
            module = module_of(name)
            parts = {
                part: tensors.pop(f"{module}.{part}")
                for part in Packed.compression_param_names(self._scheme)
            }
            weight = Packed.decompress(parts, self._scheme)["weight"]
            tensors[f"{module}.weight"] = weight.to(dtype)
        return tensors

    def with_dense_kv(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        kept = self.settings.get("modules_to_not_convert")
        if not kept:
            # Readers find dense modules by themselves, but not once some are named.
            kept = sorted(
                module_of(name)
                for name, shape in shapes.items()
                if name.endswith(".weight") and len(shape) == 2
            )
        dense = [f"self_attn.{projection}" for projection in DENSE]
        return {**self.settings, "modules_to_not_convert": [*kept, *dense]}
