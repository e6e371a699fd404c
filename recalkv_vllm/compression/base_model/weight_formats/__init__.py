"""How a base model's weights are quantized on disk: one class per ``quant_method``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recalkv_vllm.architectures import has_fused_qkv
from recalkv_vllm.compression.base_model.weight_formats.awq import Awq
from recalkv_vllm.compression.base_model.weight_formats.compressed_tensors import CompressedTensors
from recalkv_vllm.compression.base_model.weight_formats.gptq import Gptq
from recalkv_vllm.compression.base_model.weight_formats.mxfp4 import Mxfp4
from recalkv_vllm.compression.base_model.weight_formats.weight_format import WeightFormat
from recalkv_vllm.compression.errors import InputError

__all__ = ["WEIGHT_FORMATS", "WeightFormat", "weight_format_of"]

WEIGHT_FORMATS: dict[str, type[WeightFormat]] = {
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "gptq": Gptq,
    "mxfp4": Mxfp4,
}


def weight_format_of(config: Mapping[str, Any]) -> WeightFormat | None:
    """How a model's weights are quantized, from its ``config.json``; None if they are not.

    Raises:
        InputError: weights that no dense form is made of, so that they give no gradients.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
    if method not in WEIGHT_FORMATS:
        raise InputError(
            f"quantization_config: quant_method {method!r}: no dense form is made of such weights, "
            f"and they give no gradients; expected one of {', '.join(sorted(WEIGHT_FORMATS))}, or "
            "the model before it was quantized"
        )
    if has_fused_qkv(config.get("model_type")):
        raise InputError(
            f"quantization_config: {config['model_type']}: expected key and value projections of "
            "their own, found quantized ones fused with the queries'; compress the model before it "
            "was quantized"
        )
    return WEIGHT_FORMATS[method](settings)
