"""Quantized latents in plain ``transformers``: what a checkpoint's cache gives back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recalkv_vllm.checkpoint import (
    FACTORS_FILE,
    AttentionGeometry,
    FactorReader,
    RecalkvConfig,
    read_hf_config,
)
from recalkv_vllm.compression.base_model.attention import CausalLM, attention_modules
from recalkv_vllm.compression.latents.rounded_projection import rounded_projections
from recalkv_vllm.compression.layer import LayerFactors


def round_latents(model: CausalLM, directory: Path) -> None:
    """Make ``model``, loaded from ``directory``, see keys and values as the served model does.

    Does nothing to a base model, or to a checkpoint whose latents are not quantized.
    """
    hf_config = read_hf_config(directory)
    if "recalkv" not in hf_config:
        return
    config = RecalkvConfig.from_hf_config(hf_config)
    if config.latent_dtype is None:
        return
    geometry = AttentionGeometry.from_hf_config(hf_config)
    with FactorReader(directory / FACTORS_FILE, config, geometry) as reader:
        for i, attention in enumerate(attention_modules(model)):
            parts = (reader.read(i, name) for name in ("down", "k_up", "v_up"))
            factors = LayerFactors(config.layers[i], *parts)
            latent_format = config.latent_format(i)
            assert latent_format is not None  # as of all layers
            projections: tuple[Any, Any] = rounded_projections(
                factors, latent_format, range(geometry.num_kv_heads), attention
            )
            attention.k_proj, attention.v_proj = projections
