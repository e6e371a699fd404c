"""Experts in the microscaling format of OCP (MX v1.0): blocks of 32 fp4 numbers and a power of two.

As gpt-oss has them: packed two to a byte along the input axis, all experts of a layer in one tensor
``*_blocks: [experts, outputs, blocks, 16]`` with ``*_scales: [experts, outputs, blocks]``. Its
attention is not quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from recalkv_vllm.compression.base_model.weight_formats.weight_format import WeightFormat

#: Of fp4 (e2m1) by its three bits without the sign.
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SCALE_BIAS = 127


class Mxfp4(WeightFormat):
    """Keys and values are dense already, so that the configuration stays as it is."""

    def dense(
        self, directory: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        for name in [name for name in tensors if name.endswith("_blocks")]:
            weight = name.removesuffix("_blocks")
            tensors[weight] = dense_experts(
                tensors.pop(name), tensors.pop(f"{weight}_scales"), dtype
            )
        return tensors

    def with_dense_kv(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return dict(self.settings)


def dense_experts(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[experts, inputs, outputs]`` of ``blocks`` and ``scales``, uint8; the first of two numbers
    is in a byte's low bits."""
    table = torch.tensor([*MAGNITUDES, *(-x for x in MAGNITUDES)], dtype=dtype)
    numbers = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    exponents = scales.int() - SCALE_BIAS
    dense = torch.ldexp(table[numbers.int()], exponents[..., None].to(dtype))
    return dense.flatten(-2).transpose(1, 2).contiguous()
