"""Weights quantized by GPTQ (arXiv 2210.17323): 2, 4 or 8 bits, packed along the input axis."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from recalkv_vllm.compression.base_model.weight_formats.weight_format import (
    DENSE,
    WeightFormat,
    module_of,
)
from recalkv_vllm.compression.errors import InputError

#: ``checkpoint_format`` to what is to be added to a stored zero point.
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
_IN_BLOCK = re.compile(r"model\.layers\.\d+\.(.+)\.qweight")


class Gptq(WeightFormat):
    """The format of AutoGPTQ and GPTQModel, with groups in any order of activations."""

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__(settings)
        checkpoint_format = settings.get("checkpoint_format", "gptq")
        if checkpoint_format not in ZERO_OFFSETS:
            raise InputError(
                f"quantization_config: checkpoint_format: expected {' or '.join(ZERO_OFFSETS)}, "
                f"found {checkpoint_format!r}"
            )
        self._zero_offset = ZERO_OFFSETS[checkpoint_format]
        if settings.get("bits") not in (2, 4, 8):
            raise InputError(
                f"quantization_config: bits: expected 2, 4 or 8, found {settings.get('bits')!r}"
            )

    def dense(
        self, directory: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        for name in [name for name in tensors if name.endswith(".qweight")]:
            module = module_of(name)
            qweight, qzeros, scales, g_idx = (
                tensors.pop(f"{module}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")
            )
            weight = dense_weight(qweight, qzeros, scales, g_idx, self._zero_offset)
            tensors[f"{module}.weight"] = weight.to(dtype)
        return tensors

    def with_dense_kv(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        # Readers take every linear layer for quantized unless these are named.
        quantized = {found[1] for name in shapes if (found := _IN_BLOCK.fullmatch(name))}
        kept = sorted(name for name in quantized if not name.endswith(DENSE))
        return {**self.settings, "modules_in_block_to_quantize": [kept]}


def dense_weight(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    zero_offset: int,
) -> torch.Tensor:
    """``W[o, i] = (q[i, o] - z[g, o]) · s[g, o]`` with ``g = g_idx[i]``: ``[out, in]``, float32.

    Bits follow from the shapes: single modules may have others than the model.

    Args:
        qweight: ``[in · bits / 32, out]`` int32.
        qzeros: ``[groups, out · bits / 32]`` int32.
        scales: ``[groups, out]``.
        g_idx: ``[in]``, the group of every input.
        zero_offset: to be added to stored zero points.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    bits = 32 * len(qweight) // len(g_idx)
    values = unpack_from_int32(qweight, bits, (len(g_idx), qweight.shape[1]), packed_dim=0)
    zeros = unpack_from_int32(qzeros, bits, scales.shape, packed_dim=1).int()
    middle = 1 << (bits - 1)  # unpacking subtracts it, from values as well
    zeros = (zeros + middle + zero_offset) % (1 << bits) - middle
    groups = g_idx.long()
    return ((values.int() - zeros[groups]) * scales.float()[groups]).T.contiguous()
