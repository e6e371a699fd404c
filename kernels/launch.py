"""From tensors to launches: grids, strides and compile-time constants of the simple kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from recalkv_vllm.kernels import heuristics
from recalkv_vllm.kernels.cache_update import write_latents
from recalkv_vllm.kernels.layout import next_power_of_2
from recalkv_vllm.kernels.merge import merge_splits
from recalkv_vllm.kernels.quantise import write_quantised_latents
from recalkv_vllm.kernels.value_up import project_values
from recalkv_vllm.latent_format import LatentFormat

#: Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on CPU tensors.
INTERPRETED = triton.knobs.runtime.interpret


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch: run it, or only compile it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 1

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self._options())

    def compile(self) -> Any:
        """Triton's compiled kernel for the active driver's target; nothing is launched."""
        return self.kernel.warmup(grid=self.grid, **self.arguments, **self._options())

    def _options(self) -> dict[str, Any]:
        options = {"num_warps": self.warps, "num_stages": self.stages}
        # Said outright because Triton 3.10 changes the default.
        return options if INTERPRETED else options | {"enable_fp_fusion": True}


_workspaces: dict[torch.device, list[torch.Tensor]] = {}


def reserve_workspace(device: torch.device, nbytes: int) -> torch.Tensor:
    """The device's workspace, at least ``nbytes`` long; reserve it before graphs are captured.

    Calls on one device share it, so they must be on one stream. A workspace that was outgrown is
    kept, because captured graphs may still write to it.

    Raises:
        RuntimeError: it would have to grow while a CUDA graph is captured.
    """
    kept = _workspaces.setdefault(device, [])
    if not kept or kept[-1].numel() < nbytes:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            found = kept[-1].numel() if kept else 0
            raise RuntimeError(
                f"workspace: expected {nbytes} bytes reserved before graph capture, found {found}"
            )
        kept.append(torch.empty(nbytes, dtype=torch.uint8, device=device))
    return kept[-1]


def cache_update_launch(
    z: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    latent_format: LatentFormat | None = None,
) -> Launch:
    """The launch of ``cache_update.py``; at least one slot."""
    if latent_format is not None:
        return quantised_update_launch(z, kv_cache, slot_mapping, latent_format)
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


def quantised_update_launch(
    z: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor, form: LatentFormat
) -> Launch:
    """The launch of ``quantise.py``; at least one slot."""
    rank = z.shape[1]
    codes, scales = form.split_cache(kv_cache)
    groups = form.num_groups(rank)
    group = form.group_size or next_power_of_2(rank)
    # As many whole groups per program as make up some 512 numbers.
    groups_per_program = min(next_power_of_2(groups), max(1, 512 // group))
    columns = groups_per_program * group
    return Launch(
        write_quantised_latents,
        (slot_mapping.shape[0], triton.cdiv(groups, groups_per_program)),
        {
            "z": z,
            "codes": codes,
            "scales": scales,
            "slot_mapping": slot_mapping,
            "stride_z": z.stride(0),
            "stride_block": codes.stride(0),
            "stride_slot": codes.stride(1),
            "stride_scale_block": scales.stride(0),
            "stride_scale_slot": scales.stride(1),
            "RANK": rank,
            "CODEC": form.dtype,
            "GROUP": group,
            "GROUPS": groups,
            "GROUPS_PER_PROGRAM": groups_per_program,
            "BLOCK_SIZE": kv_cache.shape[1],
        },
        warps=1 if columns <= 256 else 4,
    )


def value_up_launch(
    o_lat: torch.Tensor, v_up: torch.Tensor, v_bias: torch.Tensor | None, out: torch.Tensor
) -> Launch:
    """The launch of ``value_up.py``; at least one token."""
    num_kv_heads, head_dim, v_width = v_up.shape
    o_lat, v_up = (x if x.stride(-1) == 1 else x.contiguous() for x in (o_lat, v_up))
    v_up = v_up.contiguous()
    tokens, num_heads, _ = o_lat.shape
    per_kv = num_heads // num_kv_heads
    config = heuristics.value_up_config(tokens * per_kv, head_dim, v_width)
    return Launch(
        project_values,
        (
            num_kv_heads,
            triton.cdiv(tokens * per_kv, config.rows),
            triton.cdiv(head_dim, config.columns),
        ),
        {
            "o_lat": o_lat,
            "v_up": v_up,
            "v_bias": None if v_bias is None else v_bias.contiguous(),
            "out": out,
            "tokens": tokens,
            "stride_token": o_lat.stride(0),
            "stride_head": o_lat.stride(1),
            "stride_out_token": out.stride(0),
            "stride_out_head": out.stride(1),
            "QUERIES_PER_KV": per_kv,
            "HEAD_DIM": head_dim,
            "V_WIDTH": v_width,
            "ROWS": config.rows,
            "COLUMNS": config.columns,
            "DEPTH": config.depth,
            "STAGES": config.stages,
        },
        warps=config.warps,
        stages=config.stages,
    )


def merge_launch(
    partial: torch.Tensor, partial_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> Launch:
    """The launch of ``merge.py``: ``partial: [splits, tokens, h_q, w_v]`` into ``out``."""
    splits, tokens, num_heads, v_width = partial.shape
    columns = min(512, next_power_of_2(v_width))
    return Launch(
        merge_splits,
        (tokens * num_heads, triton.cdiv(v_width, columns)),
        {
            "partial": partial,
            "partial_lse": partial_lse,
            "out": out,
            "lse": lse,
            "num_splits": splits,
            "stride_split": partial.stride(0),
            "stride_lse_split": partial_lse.stride(0),
            "V_WIDTH": v_width,
            "COLUMNS": columns,
            "MAX_SPLITS": heuristics.MAX_SPLITS,
        },
        warps=1 if columns <= 128 else 4,
    )
