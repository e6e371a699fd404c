"""The fourth stage of compression: factors of all layers, made one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.base_model.attention import CausalLM, attention_modules
from recalkv_vllm.compression.calibration.statistics import Statistics
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.factoring.output_refit import OutputRefit
from recalkv_vllm.compression.latents.rotation import rotate_latents, unit_blocks
from recalkv_vllm.compression.layer import LayerFactors, LayerInputs, reorder_rows
from recalkv_vllm.compression.lowrank.linalg import relative_error
from recalkv_vllm.compression.methods import Method
from recalkv_vllm.compression.plan import ModelPlan
from recalkv_vllm.compression.progress import track


class ModelLayers(Sequence[LayerInputs]):
    """What there is to factor in each layer of a model, made when asked for."""

    def __init__(self, model: CausalLM, geometry: AttentionGeometry, statistics: Statistics | None):
        self.model = model
        self._attention = attention_modules(model)
        self.geometry = geometry
        self.statistics = statistics

    def __len__(self) -> int:
        return len(self._attention)

    def __getitem__(self, layer):
        attention = self._attention[layer]  # ends iteration by IndexError
        return LayerInputs(
            index=layer,
            k_weight=attention.k_proj.weight.data.double(),
            v_weight=attention.v_proj.weight.data.double(),
            num_kv_heads=self.geometry.num_kv_heads,
            statistics=self.statistics.inputs(layer) if self.statistics else None,
            fisher=self.statistics.kronecker(layer) if self.statistics else None,
        )


def factor_layers(
    method: Method[Any],
    plan: ModelPlan,
    layers: ModelLayers,
    dtype: torch.dtype,
    refit: OutputRefit | None = None,
) -> tuple[list[LayerFactors], dict[str, Any]]:
    """Factor every layer; latents that will be quantized are rotated.

    Args:
        method: how to factor.
        plan: of the method.
        layers: the model's, not factored yet.
        dtype: of the factors.
        refit: of ``o_proj``, if it is to follow the factors.

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
    for inputs in track(layers, "factoring", total=len(layers)):
        layer = method.factor(inputs, plan)
        if plan.latent_format(inputs.index) is not None:
            layer = rotate_latents(layer)
        if layer.layout.bands is not None:
            assert inputs.statistics is not None  # methods that know bands ask for moments
            layer = unit_blocks(layer, inputs.statistics.second_moment)
        layer = layer.to(dtype)
        layer.layout.validate(layers.geometry, f"layer {inputs.index}")
        if not all(t.isfinite().all() for t in (layer.down, layer.k_up, layer.v_up)):
            raise InputError(
                f"layer {inputs.index}: factors overflow {dtype}; choose another --dtype"
            )
        metric = inputs.statistics.second_moment if inputs.statistics else None
        order = layer.layout.head_order
        for weight, product, errors in zip(
            (inputs.k_weight, inputs.v_weight), layer.products(), (k_errors, v_errors), strict=True
        ):
            errors.append(relative_error(reorder_rows(weight, order), product.double(), metric))
        if refit is not None:
            layer = replace(layer, output=refit.refit(inputs.index, layer))
        factors.append(layer)
    of = "outputs" if layers.statistics else "weights"
    return factors, {"of": of, "k": k_errors, "v": v_errors}
