"""Quantised latents in plain ``transformers``: what a checkpoint's cache gives back."""

from __future__ import annotations

from pathlib import Path

from recalkv_vllm.checkpoint import (
    FACTORS_FILE,
    AttentionGeometry,
    FactorReader,
    RecalkvConfig,
    read_hf_config,
)
from recalkv_vllm.compression.architectures import CausalLM, attention_modules
from recalkv_vllm.compression.factors import LayerFactors
from recalkv_vllm.compression.rounded_projection import rounded_projections


def round_latents(model: CausalLM, directory: Path) -> None:
    """Make ``model``, loaded from ``directory``, see keys and values as its served form does.

    Does nothing to a base model, or to a checkpoint whose latents are not quantised.
    """
    hf_config = read_hf_config(directory)
    if "recalkv" not in hf_config:
        return
    config = RecalkvConfig.from_hf_config(hf_config)
    form = config.latent_quantization
    if form is None:
        return
    geometry = AttentionGeometry.from_hf_config(hf_config)
    with FactorReader(directory / FACTORS_FILE, config, geometry) as reader:
        for i, attention in enumerate(attention_modules(model)):
            parts = (reader.read(i, name) for name in ("down", "k_up", "v_up"))
            factors = LayerFactors(config.layers[i], *parts)
            attention.k_proj, attention.v_proj = rounded_projections(
                factors, form, range(geometry.num_kv_heads), attention
            )
