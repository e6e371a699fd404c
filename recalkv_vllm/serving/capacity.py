"""How many tokens a KV cache will hold, from configurations alone; nothing here imports vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from recalkv_vllm.band_format import stored_format, token_bytes
from recalkv_vllm.checkpoint import (
    FACTORS_FILE,
    SPAN_MULTIPLE,
    AttentionGeometry,
    LatentLayout,
    RecalkvConfig,
    rank_budget,
)
from recalkv_vllm.serving.sharding import shard_latent
from recalkv_vllm.span import Span


@dataclass(frozen=True, slots=True)
class Capacity:
    """Tokens of one KV cache, and how many requests of the longest length fit into it."""

    bytes_per_token: int
    kv_cache_tokens: int
    max_concurrency: float


def capacity(
    bytes_per_token: int, kv_cache_bytes: int, block_size: int, max_model_len: int
) -> Capacity:
    """What vLLM makes of ``kv_cache_bytes``: whole blocks of ``block_size`` tokens."""
    blocks = max(0, kv_cache_bytes) // (bytes_per_token * block_size)
    tokens = blocks * block_size
    return Capacity(bytes_per_token, tokens, tokens / max_model_len)


def dense_bytes_per_token(geometry: AttentionGeometry, itemsize: int, tp_size: int) -> int:
    """Of one rank. With more ranks than KV heads vLLM gives each rank one head."""
    heads = max(1, geometry.num_kv_heads // tp_size)
    return 2 * heads * geometry.head_dim * geometry.num_layers * itemsize


def latent_bytes_per_token(
    config: RecalkvConfig, geometry: AttentionGeometry, itemsize: int, tp_size: int
) -> int:
    """Of one rank; all cache alike.

    Raises:
        ValueError: ranks and head groups do not divide one another.
    """
    shards = [shard_latent(layer, geometry, 0, tp_size) for layer in config.layers]
    return sum(
        token_bytes(
            stored_format(shard.bands, config.latent_quantization),
            shard.rank,
            itemsize,
            shard.key_scales,
        )
        for shard in shards
    )


def hypothetical_config(
    compression: float, geometry: AttentionGeometry, tp_size: int
) -> RecalkvConfig:
    """A checkpoint as ``compress`` would make it: one joint latent per rank, equal in all layers.

    Raises:
        ValueError: ``compression`` is not in [0, 1), or leaves less than a span per rank.
    """
    if not 0 <= compression < 1:
        raise ValueError(f"compression: expected a fraction in [0, 1), found {compression}")
    groups = min(tp_size, geometry.num_kv_heads)
    budget = rank_budget(compression, geometry) // geometry.num_layers
    width = budget // (groups * SPAN_MULTIPLE) * SPAN_MULTIPLE
    if width == 0 or geometry.num_kv_heads % groups:
        raise ValueError(
            f"compression {compression}: leaves {budget} cached elements per token and layer, "
            f"which {groups} ranks of {geometry.num_kv_heads} KV heads cannot share"
        )
    spans = tuple(Span(i * width, (i + 1) * width) for i in range(groups))
    layout = LatentLayout(
        rank=groups * width,
        k_group_size=geometry.num_kv_heads // groups,
        k_spans=spans,
        v_spans=spans,
        head_order=tuple(range(geometry.num_kv_heads)),
    )
    return RecalkvConfig("supposed", compression, (layout,) * geometry.num_layers)


def factor_bytes(config: RecalkvConfig, geometry: AttentionGeometry, itemsize: int) -> int:
    """Of all layers' factors."""
    return itemsize * sum(
        prod(shape) for layer in config.layers for shape in layer.factor_shapes(geometry).values()
    )


def projection_bytes(geometry: AttentionGeometry, itemsize: int) -> int:
    """Of all layers' key and value projections, which factors replace in a server's memory."""
    return geometry.dense_width * geometry.hidden_size * geometry.num_layers * itemsize


def weight_bytes(directory: Path, hf_config: Mapping[str, Any], itemsize: int) -> int:
    """Of all weights but factors: of the files, or as the configuration says if there are none."""
    files = [path for path in directory.glob("*.safetensors") if path.name != FACTORS_FILE]
    if files:
        return sum(path.stat().st_size for path in files)
    # Not above: transformers takes seconds to load, and most directories have weights.
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {key: value for key, value in hf_config.items() if key != "recalkv"}
    config = AutoConfig.for_model(**plain)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return itemsize * sum(parameter.numel() for parameter in model.parameters())
