"""Factors of all layers, made one layer at a time and put into the model."""

from __future__ import annotations

from typing import Any

import torch

from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.architectures import CausalLM, attention_modules
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.factors import LayerFactors, LayerInputs, reorder_rows
from recalkv_vllm.compression.linalg import relative_error
from recalkv_vllm.compression.methods import Method
from recalkv_vllm.compression.progress import track
from recalkv_vllm.compression.ranks import LayerRanks
from recalkv_vllm.compression.statistics import Statistics
from recalkv_vllm.compression.writer import install_factors


def factor_layers(
    model: CausalLM,
    geometry: AttentionGeometry,
    method: Method,
    ranks: list[LayerRanks],
    statistics: Statistics | None,
    dtype: torch.dtype,
) -> tuple[list[LayerFactors], dict[str, Any]]:
    """Factor every layer of ``model`` and install the factors there.

    Args:
        model: the base model in its own dtype; changed in place.
        geometry: of the model.
        method: how to factor.
        ranks: per layer.
        statistics: what the method asked for.
        dtype: of the factors.

    Returns:
        Factors rounded to ``dtype``, and the relative errors that they leave: ``k`` and ``v`` per
        layer, ``of`` the projections' ``outputs`` on the calibration text, or of the ``weights``
        where there is none.

    Raises:
        InputError: factors that ``dtype`` cannot hold.
    """
    factors: list[LayerFactors] = []
    k_errors: list[float] = []
    v_errors: list[float] = []
    modules = attention_modules(model)
    for layer, attention in enumerate(track(modules, "factoring", total=len(modules))):
        inputs = LayerInputs(
            k_weight=attention.k_proj.weight.data.double(),
            v_weight=attention.v_proj.weight.data.double(),
            num_kv_heads=geometry.num_kv_heads,
            statistics=statistics.inputs(layer) if statistics else None,
        )
        part = method.factor(inputs, ranks[layer]).to(dtype)
        part.layout.validate(geometry, f"layer {layer}")
        if not all(t.isfinite().all() for t in (part.down, part.k_up, part.v_up)):
            raise InputError(f"layer {layer}: factors overflow {dtype}; choose another --dtype")
        metric = inputs.statistics.second_moment if inputs.statistics else None
        order = part.layout.head_order
        for weight, product, errors in zip(
            (inputs.k_weight, inputs.v_weight), part.products(), (k_errors, v_errors), strict=True
        ):
            errors.append(relative_error(reorder_rows(weight, order), product.double(), metric))
        install_factors(attention, part)
        factors.append(part)
    of = "outputs" if statistics else "weights"
    return factors, {"of": of, "k": k_errors, "v": v_errors}
