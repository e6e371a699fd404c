"""Weights that reach a running engine: what does not fit is refused, and the old ones stay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from recalkv_vllm.checkpoint import (
    CONFIG_FILE,
    AttentionGeometry,
    CheckpointError,
    RecalkvConfig,
    read_hf_config,
)
from recalkv_vllm.serving.factor_files import SEPARATE_FACTORS, check_base


def reloading(model: nn.Module) -> bool:
    """Whether vLLM has put ``model`` aside for a reload, and will process what is loaded now."""
    return get_layerwise_info(model).can_load()


@contextmanager
def old_weights_kept(model: nn.Module, model_config: ModelConfig) -> Iterator[None]:
    """Put back what vLLM took out of ``model`` for a reload that fails inside.

    vLLM would mix what it has buffered with the next reload's. Modules that had all of their
    weights by then keep the new ones.
    """
    try:
        yield
    except Exception:
        if reloading(model):
            for module in model.modules():
                info = get_layerwise_info(module)
                info.loaded_weights.clear()
                info.load_numel = 0
            finalize_layerwise_reload(model, model_config)
        raise


def config_beside(factors: Path, built: RecalkvConfig, model_config: ModelConfig) -> RecalkvConfig:
    """Configuration beside ``factors``; it fits the model that was ``built``.

    Cache and kernels are made for ranks, spans and latent format; heads may have another order.

    Raises:
        CheckpointError: it does not, or is none; or the base model is not the factors'.
    """
    path = factors.parent / CONFIG_FILE
    theirs = read_hf_config(path.parent)
    base = model_config.hf_config.to_dict()
    found = RecalkvConfig.from_hf_config({**base, "recalkv": theirs.get("recalkv")}, str(path))
    if SEPARATE_FACTORS in base:
        layers = AttentionGeometry.from_hf_config(base).layer_indices
        check_base(model_config, theirs, layers, str(path))
    fixed = [
        (config.latent_quantization, [replace(layer, head_order=()) for layer in config.layers])
        for config in (built, found)
    ]
    if fixed[0] != fixed[1]:
        raise CheckpointError(
            f"{path}: recalkv: expected the ranks, spans and latent format that the engine was "
            "started with, found others"
        )
    return found
