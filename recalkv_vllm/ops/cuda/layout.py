"""A layer's constants as the CUDA kernel takes them; runs once, when weights are loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from recalkv_vllm.ops.contract import KernelUnavailableError, LatentLayer
from recalkv_vllm.ops.cuda.plan import tile_spans, v_blocks
from recalkv_vllm.ops.cuda.shapes import LayerShape, Plan
from recalkv_vllm.ops.key_norm import without_norm
from recalkv_vllm.ops.rotary import pair_order

#: In place of a window, where there is none.
NO_WINDOW = 1 << 30

#: Positions per row of the base table; tiles are this long or twice as long.
BASE_STEP = 16
LARGEST_TILE = 32
#: Largest error of a rotation put together from two rows of a table. An angle of 131072 has a
#: rounding error of 2**-8 in the float32 tables that models use, a bf16 table one of 2**-9.
ROTATION_ERROR = 2.0**-6


class LayerTensors(NamedTuple):
    """The op's tensors from ``k_factor`` on; columns of a head are in pair order.

    Args:
        k_factor: see :func:`pack_factor`.
        k_bias: ``[h_kv, d]`` float32.
        base_rotation: see :func:`rotation_tables`, as for the next.
        local_rotation: alike.
    """

    k_factor: torch.Tensor
    k_bias: torch.Tensor | None
    base_rotation: torch.Tensor
    local_rotation: torch.Tensor


class LayerSizes(NamedTuple):
    """The op's argument ``sizes``; names as in ``csrc/cuda/params.h``."""

    k_width: int
    v_width: int
    rotated_half: int
    window: int
    base_rotation_stride: int


class LayerScalars(NamedTuple):
    """The op's last arguments; a ``soft_cap`` of 0 is none."""

    scale: float
    soft_cap: float


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """What the torch op ``decode`` is told of a layer; each part in the op's order."""

    tensors: LayerTensors
    sizes: LayerSizes
    scalars: LayerScalars


def pack_layer(layer: LatentLayer) -> PackedLayer:
    """Pack a layer's constants for the kernel that all devices have.

    Raises:
        KernelUnavailableError: the kernel cannot rotate keys as the layer's table does.
    """
    layer = small_keys(layer)
    device = layer.k_up.device
    rotations = rotation_tables(layer.cos_sin_cache, layer.head_dim, device)
    if rotations is None:
        raise KernelUnavailableError(
            "cos_sin_cache: expected angles proportional to the position, found others"
        )
    order = pair_order(layer.head_dim, layer.rot_dim, layer.is_neox).to(device)
    return PackedLayer(
        tensors=LayerTensors(
            k_factor=pack_factor(layer.k_up, layer.head_dim, order),
            k_bias=None if layer.k_bias is None else layer.k_bias.float()[:, order].contiguous(),
            base_rotation=rotations[0],
            local_rotation=rotations[1],
        ),
        sizes=LayerSizes(
            k_width=layer.k_width,
            v_width=layer.v_width,
            rotated_half=layer.rot_dim // 2 if layer.is_neox else 0,
            window=layer.sliding_window or NO_WINDOW,
            base_rotation_stride=0 if layer.cos_sin_cache is None else layer.head_dim,
        ),
        scalars=LayerScalars(
            scale=layer.scale,
            soft_cap=layer.soft_cap or 0.0,
        ),
    )


def small_keys(layer: LatentLayer) -> LatentLayer:
    """A normed layer without its norm, and ``scale`` making up for smaller keys.

    Keys are rounded before cached scales norm them: below their own magnitude, as they are before
    the norm's weight, they cannot overflow float16.
    """
    if layer.k_norm_weight is None:
        return layer
    largest = float(layer.k_norm_weight.abs().max())
    factor = 2.0 ** math.ceil(math.log2(2 * largest)) if largest else 1.0
    weight = layer.k_norm_weight.float() / factor
    return without_norm(replace(layer, k_norm_weight=weight, scale=layer.scale * factor))


def pack_factor(k_up: torch.Tensor, head_dim: int, order: torch.Tensor) -> torch.Tensor:
    """``[h_kv, d/16, width/16, 32, 8]``: right-hand fragments of mma.m16n8k16, lane by lane.

    Lane ``4g + t`` of a 16x16 block holds, of columns ``g`` and ``8 + g`` of the key, the latents
    ``2t, 2t + 1, 2t + 8, 2t + 9``: its operands of two instructions in one 16-byte load.
    """
    width = k_up.shape[2]
    rows = k_up.reshape(-1, head_dim, width)[:, order.to(k_up.device)]
    blocks = rows.reshape(-1, head_dim // 16, 2, 8, width // 16, 2, 4, 2)
    packed = blocks.permute(0, 1, 4, 3, 6, 2, 5, 7).contiguous()
    return packed.view(-1, head_dim // 16, width // 16, 32, 8)


def rotation_tables(
    cos_sin_cache: torch.Tensor | None,
    head_dim: int,
    device: torch.device,
    tile: int = LARGEST_TILE,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Rotation of every 16th position, and by 0 to ``tile - 1``: ``[rows, d/2, 2]`` float32.

    The rotation at ``p + j`` is the one at ``p`` times the one by ``j``; a constant magnitude of
    the table (YaRN) stays with the former. Pairs that RoPE leaves alone get (1, 0). Returns None
    for a table that is not made of rotations by angles proportional to the position.
    """
    if cos_sin_cache is None:
        still = torch.tensor([1.0, 0.0], dtype=torch.float32, device=device)
        return still.expand(1, head_dim // 2, 2).contiguous(), still.expand(
            tile, head_dim // 2, 2
        ).contiguous()
    positions, rot_dim = cos_sin_cache.shape
    table = torch.complex(*cos_sin_cache.float().split(rot_dim // 2, dim=1))
    magnitude = table[0].real
    base, local = table[::BASE_STEP], table[:tile] / magnitude
    steps = torch.arange(min(tile, positions), device=device)
    error = 0.0
    # In parts: a table of a million positions has gigabytes of products.
    for starts in torch.arange(0, positions - len(steps) + 1, BASE_STEP, device=device).split(4096):
        expected = table[starts[:, None] + steps]
        found = table[starts][:, None] * local
        error = max(error, float(((found - expected) / magnitude).abs().max()))
    if not error <= ROTATION_ERROR:
        return None

    def padded(rows: torch.Tensor, count: int) -> torch.Tensor:
        result = torch.zeros(count, head_dim // 2, 2, dtype=torch.float32, device=device)
        result[..., 0] = 1
        result[: rows.shape[0], : rot_dim // 2] = torch.view_as_real(rows)
        return result

    return padded(base, base.shape[0]), padded(local, tile)


def tile_columns(layer: LayerShape, plan: Plan) -> torch.Tensor:
    """``[v_blocks, head_blocks, 2 + heads + chunks]`` int32, as ``TileColumns`` in staging.cuh.

    Of each block: column of the K span in its tile, number of 8-column chunks, columns of its
    heads' V spans in the tile, and the source column of every chunk.
    """
    rows = []
    for part in v_blocks(layer, plan.v_tiles):
        for first in range(0, len(layer.k_spans), plan.heads):
            sources = [
                column
                for span in tile_spans(layer, first, plan.heads, part)
                for column in range(span.start, span.end, 8)
            ]
            place = {column: 8 * i for i, column in enumerate(sources)}
            v_spans = layer.v_spans[first : first + plan.heads]
            values = [place[span.start + part.start] for span in v_spans]
            unused = [0] * (plan.tile_width // 8 - len(sources))
            rows.append(
                [place[layer.k_spans[first].start], len(sources), *values, *sources, *unused]
            )
    table = torch.tensor(rows, dtype=torch.int32)
    return table.view(-1, len(layer.k_spans) // plan.heads, table.shape[1])
