"""Base models whose weights are quantised: one class per ``quant_method``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recalkv_vllm.compression.architectures import FUSED
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.quantised.awq import Awq
from recalkv_vllm.compression.quantised.base import Quantisation
from recalkv_vllm.compression.quantised.compressed_tensors import CompressedTensors
from recalkv_vllm.compression.quantised.gptq import Gptq

__all__ = ["METHODS", "Quantisation", "quantisation_of"]

METHODS: dict[str, type[Quantisation]] = {
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "gptq": Gptq,
}


def quantisation_of(config: Mapping[str, Any]) -> Quantisation | None:
    """How a model's weights are quantised, from its ``config.json``; None if they are not.

    Raises:
        InputError: weights that no dense form is made of, so that they give no gradients.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
    if method not in METHODS:
        raise InputError(
            f"quantization_config: quant_method {method!r}: no dense form is made of such weights, "
            f"and they give no gradients; expected one of {', '.join(sorted(METHODS))}, or the "
            "model before it was quantised"
        )
    if config.get("model_type") in FUSED:
        raise InputError(
            f"quantization_config: {config['model_type']}: expected key and value projections of "
            "their own, found quantised ones fused with the queries'; compress the model before it "
            "was quantised"
        )
    return METHODS[method](settings)
