"""What vLLM's offloading is told of latents: it sees bytes alone."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.v1.kv_offload.base import OffloadingSpec

from recalkv_vllm.band_format import BandFormat, token_bytes
from recalkv_vllm.checkpoint import AttentionGeometry, RecalkvConfig
from recalkv_vllm.serving.cold_tier.chunk_layout import ChunkLayout, LayerPages
from recalkv_vllm.serving.sharding import shard_latent

#: ``spec_name`` of the offloading that has a cold tier.
SPEC = "ColdTierSpec"
#: In the connector's own configuration, which goes to the scheduler's process.
KEY = "recalkv_latents"


def announce_latents(
    config: VllmConfig, cached: RecalkvConfig, geometry: AttentionGeometry
) -> None:
    """Tell offloading with a cold tier whose latents it gets, and which bands they are in."""
    transfer, parallel = config.kv_transfer_config, config.parallel_config
    extra_config = {} if transfer is None else transfer.kv_connector_extra_config
    if extra_config.get("spec_name") != SPEC:
        return
    ranks = []
    tp_size = parallel.tensor_parallel_size
    if parallel.world_size == tp_size and all(layer.bands for layer in cached.layers):
        for rank in range(tp_size):
            shards = [shard_latent(layer, geometry, rank, tp_size) for layer in cached.layers]
            ranks.append([[[*map(list, one.bands or ())], one.key_scales] for one in shards])
    # Lists and strings alone: it is sent to the scheduler's process.
    extra_config[KEY] = {"factors": cached.factors_sha256 or "", "ranks": ranks}


def served_factors(spec: OffloadingSpec) -> str:
    """What tells a checkpoint's latents from another's; empty for one that does not say."""
    return spec.extra_config.get(KEY, {}).get("factors", "")


def served_layout(spec: OffloadingSpec, size: int) -> ChunkLayout | None:
    """Where latents are in a chunk of ``size`` bytes; None where it is not known.

    A chunk has a part for each rank, one behind the other. In a part are the pages of one layer
    after those of another, or, where vLLM's layout has blocks outermost, those of one block after
    those of another.
    """
    ranks, config = spec.extra_config.get(KEY, {}).get("ranks"), spec.config
    if not ranks or len(config.groups) != 1 or config.canonical_layout:
        return None
    (group,) = config.groups
    blocks, block_size = config.cache.blocks_per_chunk, group.tokens_per_block
    block_bytes = config.worker_kv_bytes_per_block
    by_block = str(config.kv_cache_layout).startswith("B")
    layers: list[LayerPages] = []
    for rank, of_rank in enumerate(ranks):
        start = 0
        for i, (bands, key_scales) in enumerate(of_rank):
            latents = BandFormat(bands)
            page = block_size * token_bytes(latents, latents.rank, 1, key_scales)
            first = rank * block_bytes * blocks + (start if by_block else start * blocks)
            stride = block_bytes if by_block else page
            starts = tuple(first + stride * block for block in range(blocks))
            layers.append(LayerPages(starts, block_size, latents, lowest=i == 0))
            start += page
        if start != block_bytes:
            # Pages are wider than latents, or there are other layers' among them.
            return None
    return ChunkLayout(size, tuple(layers))
