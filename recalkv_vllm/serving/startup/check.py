"""What is refused before an engine starts, each in one line that names it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm.config import VllmConfig

from recalkv_vllm.checkpoint import (
    AttentionGeometry,
    CheckpointError,
    FactorReader,
    RecalkvConfig,
)
from recalkv_vllm.serving.cold_tier.served_layout import announce_latents
from recalkv_vllm.serving.factor_files import (
    SEPARATE_FACTORS,
    adopt_separate_factors,
    locate_factors,
    names_separate_factors,
)
from recalkv_vllm.serving.latent_dtype import model_dtype, served_config
from recalkv_vllm.serving.names import ARCHITECTURES, BACKEND_NAME
from recalkv_vllm.serving.sharding import shard_latent
from recalkv_vllm.serving.startup.cache_size import check_cache_size
from recalkv_vllm.serving.startup.errors import ServingError
from recalkv_vllm.serving.startup.lora import (
    check_adapter,
    check_adapters_of_requests,
    served_layers,
)
from recalkv_vllm.serving.startup.options import unsupported_option
from recalkv_vllm.serving.startup.sharded_state import SHARDED_STATE, check_sharded_state


@dataclass(frozen=True, slots=True)
class Served:
    """A checkpoint that passed.

    Args:
        stored: its configuration.
        cached: the same with the latent format of the cache, which a flag may have chosen.
        geometry: of the model.
    """

    stored: RecalkvConfig
    cached: RecalkvConfig
    geometry: AttentionGeometry


def check_servable(config: VllmConfig, adapters: Sequence[str] = ()) -> Served | None:
    """Check that we can serve ``config`` and LoRA adapters faithfully, and complete ``config``.

    Separate factors' configuration goes into that of the model, and draft models are freed of a
    backend that is not theirs.

    Returns:
        The checkpoint; None for a stock model, and for random weights.

    Raises:
        ServingError: we cannot.
    """
    backend = config.attention_config.backend
    requested = None if backend is None else backend.name
    architectures = config.model_config.architectures
    separate = names_separate_factors(config.model_config)
    if not any(name in ARCHITECTURES for name in architectures):
        if separate:
            raise ServingError(
                f"recalkv: --hf-overrides: expected the factors' architectures beside recalkv, "
                f"found {', '.join(architectures)}"
            )
        if requested == BACKEND_NAME:
            raise ServingError(
                f"recalkv: {config.model_config.model}: expected a compressed checkpoint for "
                f"--attention-backend recalkv, found {', '.join(architectures)} without factors; "
                f"make one with: recalkv compress {config.model_config.model} -o OUT "
                f"--compression 0.5"
            )
        return None
    if reason := unsupported_option(config, requested):
        raise ServingError(f"recalkv: {reason}")
    try:
        if separate:
            adopt_separate_factors(config.model_config)
        served = _check_checkpoint(config)
        for adapter in adapters:
            check_adapter(adapter, served_layers(config))
    except (CheckpointError, ValueError) as error:
        raise ServingError(f"recalkv: {error}") from None
    if config.lora_config is not None:
        check_adapters_of_requests()
    if config.speculative_config is not None:
        # A draft model may inherit the backend, and is a stock model; our layers need no flag.
        config.attention_config.backend = None
    return None if config.load_config.load_format == "dummy" else served


def _check_checkpoint(config: VllmConfig) -> Served:
    """Read every factor once, and cut it as the ranks will, before any process is started."""
    model = config.model_config
    hf_config = model.hf_config.to_dict()
    stored = RecalkvConfig.from_hf_config(hf_config, f"{model.model}/config.json")
    cached = served_config(stored, config.cache_config.cache_dtype, model_dtype(model))
    geometry = AttentionGeometry.from_hf_config(hf_config)
    if hf_config.get(SEPARATE_FACTORS) and config.quant_config is not None:
        for i, layout in enumerate(stored.layers):
            if layout.head_order != tuple(range(geometry.num_kv_heads)):
                raise CheckpointError(
                    f"factors of layer {i}: expected heads in natural order over quantized "
                    f"weights, found {list(layout.head_order)}; compress with --k-group-size 1"
                )
    tp_size = config.parallel_config.tensor_parallel_size
    for i, layout in enumerate(stored.layers):
        ranks = {shard_latent(layout, geometry, r, tp_size).rank for r in range(tp_size)}
        if len(ranks) > 1:
            raise CheckpointError(
                f"tensor_parallel_size: with {tp_size} ranks, layer {i} would cache "
                f"{' and '.join(map(str, sorted(ranks)))} elements per token on different ranks"
            )
    check_cache_size(config, cached, geometry)
    announce_latents(config, cached, geometry)
    load_format = config.load_config.load_format
    if load_format in SHARDED_STATE:
        check_sharded_state(Path(model.model), stored, geometry, tp_size)
    elif load_format != "dummy":
        with FactorReader(locate_factors(model), stored, geometry) as reader:
            reader.check()
    return Served(stored, cached, geometry)
