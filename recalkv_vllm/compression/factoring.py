"""Factors of all layers, made one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.architectures import CausalLM, attention_modules
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.factors import LayerFactors, LayerInputs, reorder_rows
from recalkv_vllm.compression.latent_rotation import rotate_latents
from recalkv_vllm.compression.linalg import relative_error
from recalkv_vllm.compression.methods import Method
from recalkv_vllm.compression.output_refit import OutputRefit
from recalkv_vllm.compression.progress import track
from recalkv_vllm.compression.ranks import LayerPlan
from recalkv_vllm.compression.statistics import Statistics


class ModelLayers(Sequence[LayerInputs]):
    """What there is to factor in each layer of a model, made when asked for."""

    def __init__(self, model: CausalLM, geometry: AttentionGeometry, statistics: Statistics | None):
        self._attention = attention_modules(model)
        self.geometry = geometry
        self.statistics = statistics

    def __len__(self) -> int:
        return len(self._attention)

    def __getitem__(self, layer):
        attention = self._attention[layer]  # ends iteration by IndexError
        return LayerInputs(
            k_weight=attention.k_proj.weight.data.double(),
            v_weight=attention.v_proj.weight.data.double(),
            num_kv_heads=self.geometry.num_kv_heads,
            statistics=self.statistics.inputs(layer) if self.statistics else None,
            fisher=self.statistics.kronecker(layer) if self.statistics else None,
        )


def factor_layers(
    geometry: AttentionGeometry,
    method: Method,
    plans: list[LayerPlan],
    layers: ModelLayers,
    dtype: torch.dtype,
    refit: OutputRefit | None = None,
    rotate: bool = False,
) -> tuple[list[LayerFactors], dict[str, Any]]:
    """Factor every layer.

    Args:
        geometry: of the model.
        method: how to factor.
        plans: per layer.
        layers: the model's, not factored yet.
        dtype: of the factors.
        refit: of ``o_proj``, if it is to follow the factors.
        rotate: latents will be quantised.

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
    for layer, inputs in enumerate(track(layers, "factoring", total=len(layers))):
        part = method.factor(inputs, plans[layer])
        part = (rotate_latents(part) if rotate else part).to(dtype)
        part.layout.validate(geometry, f"layer {layer}")
        if not all(t.isfinite().all() for t in (part.down, part.k_up, part.v_up)):
            raise InputError(f"layer {layer}: factors overflow {dtype}; choose another --dtype")
        metric = inputs.statistics.second_moment if inputs.statistics else None
        order = part.layout.head_order
        for weight, product, errors in zip(
            (inputs.k_weight, inputs.v_weight), part.products(), (k_errors, v_errors), strict=True
        ):
            errors.append(relative_error(reorder_rows(weight, order), product.double(), metric))
        if refit is not None:
            part = replace(part, output=refit.refit(layer, part))
        factors.append(part)
    of = "outputs" if layers.statistics else "weights"
    return factors, {"of": of, "k": k_errors, "v": v_errors}
