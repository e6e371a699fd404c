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
    """Tell offloading with a cold tier which bands every layer has on every rank, if all have."""
    transfer, parallel = config.kv_transfer_config, config.parallel_config
    extra_config = {} if transfer is None else transfer.kv_connector_extra_config
    if extra_config.get("spec_name") != SPEC:
        return
    if parallel.world_size != parallel.tensor_parallel_size:
        return
    if any(layer.bands is None for layer in cached.layers):
        return
    ranks = []
    for rank in range(parallel.world_size):
        shards = [shard_latent(one, geometry, rank, parallel.world_size) for one in cached.layers]
        ranks.append([[list(map(list, shard.bands or ())), shard.key_scales] for shard in shards])
    extra_config[KEY] = ranks


def served_layout(spec: OffloadingSpec, size: int) -> ChunkLayout | None:
    """Where latents are in a chunk of ``size`` bytes; None where it is not known."""
    ranks = spec.extra_config.get(KEY)
    config = spec.config
    if ranks is None or len(config.groups) != 1 or config.canonical_layout:
        return None
    (group,) = config.groups
    if len(group.layer_names) != len(ranks[0]):
        return None
    blocks, block_size = config.cache.blocks_per_chunk, group.tokens_per_block
    by_block = str(config.kv_cache_layout).startswith("B")
    layers: list[LayerPages] = []
    for rank, of_rank in enumerate(ranks):
        start = rank * config.worker_kv_bytes_per_block * blocks
        end = start
        for i, (bands, key_scales) in enumerate(of_rank):
            latents = BandFormat(bands)
            page = block_size * token_bytes(latents, latents.rank, 1, key_scales)
            stride = config.worker_kv_bytes_per_block if by_block else page
            starts = tuple(end + stride * block for block in range(blocks))
            layers.append(LayerPages(starts, block_size, latents, lowest=i == 0))
            end += page if by_block else page * blocks
        if end - start != config.worker_kv_bytes_per_block * (1 if by_block else blocks):
            return None
    return ChunkLayout(size, tuple(layers))
