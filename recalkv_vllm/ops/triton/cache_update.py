"""From the arguments of ``update_cache`` to a launch."""

from __future__ import annotations

from typing import Any

import torch
import triton

from recalkv_vllm.band_format import BLOCK_COLUMNS, BandFormat, CacheFormat, band_bytes
from recalkv_vllm.kernels.cache_update import write_latents
from recalkv_vllm.kernels.columns import cut_runs, next_power_of_2, runs_of
from recalkv_vllm.kernels.quantize import write_quantized_latents
from recalkv_vllm.kernels.quantize_bands import write_latents_in_bands
from recalkv_vllm.latent_format import LatentFormat
from recalkv_vllm.ops.triton.launch import Launch


def cache_update_launch(
    z: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    latent_format: CacheFormat | None = None,
) -> Launch:
    """The launch of ``cache_update.py``; at least one slot."""
    if isinstance(latent_format, BandFormat):
        return band_update_launch(z, kv_cache, slot_mapping, latent_format)
    if latent_format is not None:
        return quantized_update_launch(z, kv_cache, slot_mapping, latent_format)
    rank = kv_cache.shape[2]
    columns = min(1024, next_power_of_2(rank))
    return Launch(
        write_latents,
        (slot_mapping.shape[0], triton.cdiv(rank, columns)),
        {
            "z": z,
            "kv_cache": kv_cache,
            "slot_mapping": slot_mapping,
            "stride_z": z.stride(0),
            "stride_block": kv_cache.stride(0),
            "stride_slot": kv_cache.stride(1),
            "RANK": rank,
            "BLOCK_SIZE": kv_cache.shape[1],
            "COLUMNS": columns,
        },
        warps=1 if columns <= 256 else 4,
    )


def quantized_update_launch(
    z: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor, latent_format: LatentFormat
) -> Launch:
    """The launch of ``quantize.py``; at least one slot."""
    rank = z.shape[1]
    codes, scales = latent_format.split_cache(kv_cache)
    groups = latent_format.num_groups(rank)
    group = latent_format.group_size or next_power_of_2(rank)
    # As many whole groups per program as make up some 512 elements.
    groups_per_program = min(next_power_of_2(groups), max(1, 512 // group))
    columns = groups_per_program * group
    return Launch(
        write_quantized_latents,
        (slot_mapping.shape[0], triton.cdiv(groups, groups_per_program)),
        {
            **_paged(z, codes, scales, slot_mapping),
            "RANK": rank,
            "CODEC": latent_format.dtype,
            "GROUP": group,
            "GROUPS": groups,
            "GROUPS_PER_PROGRAM": groups_per_program,
        },
        warps=1 if columns <= 256 else 4,
    )


def band_update_launch(
    z: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor, latent_format: BandFormat
) -> Launch:
    """The launch of ``quantize_bands.py``; at least one slot."""
    codes, scales = latent_format.split_cache(kv_cache)
    chunks = cut_runs(runs_of(latent_format.rank, latent_format), 0, latent_format.rank)
    return Launch(
        write_latents_in_bands,
        (slot_mapping.shape[0], len(chunks)),
        {
            **_paged(z, codes, scales, slot_mapping),
            "CHUNKS": chunks,
            "CODE_BYTES": latent_format.code_bytes,
            "USED_BYTES": sum(map(band_bytes, latent_format.bands)),
            "BLOCK_COLUMNS": BLOCK_COLUMNS,
        },
        warps=1,
    )


def _paged(
    z: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, slot_mapping: torch.Tensor
) -> dict[str, Any]:
    """Arguments of both kernels that quantize: what is read, and where codes and scales go."""
    return {
        "z": z,
        "codes": codes,
        "scales": scales,
        "slot_mapping": slot_mapping,
        "stride_z": z.stride(0),
        "stride_block": codes.stride(0),
        "stride_slot": codes.stride(1),
        "stride_scale_block": scales.stride(0),
        "stride_scale_slot": scales.stride(1),
        "BLOCK_SIZE": codes.shape[1],
    }
