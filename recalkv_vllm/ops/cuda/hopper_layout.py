"""A layer's constants as the CUDA kernel for Hopper takes them; runs once, with the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from recalkv_vllm.band_format import BLOCK_COLUMNS
from recalkv_vllm.ops.contract import KernelUnavailableError, LatentLayer
from recalkv_vllm.ops.cuda.layout import (
    LayerScalars,
    LayerSizes,
    PackedLayer,
    pack_layer,
    rotation_tables,
    small_keys,
)
from recalkv_vllm.ops.rotary import pair_order

#: Powers of two by which elements of latents in bands, and keys made of them, are smaller than what
#: they stand for, so that float16 has room: see hopper_bands.cuh.
ELEMENT_SCALE = 9
KEY_SCALE = 4
#: Tokens of a tile, and columns of a row of the factor in shared memory, of elements.
TILE = 64
SWIZZLED_COLUMNS = 64
#: A pair is slow if, within a tile, its rotation is linear in the offset but for this much: half of
#: a unit in the last place of keys that are rounded.
SLOW_ERROR = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


class HopperTensors(NamedTuple):
    """The op's tensors from ``k_factor`` on; columns of a head are in :func:`member_order`.

    Args:
        k_factor: see :func:`swizzle_rows`, ``[h_kv, ...]``, or for bands ``[h_kv, v_blocks, ...]``
            in float16.
        k_bias: ``[h_kv, d]`` float32.
        base_rotation: see :func:`~.layout.rotation_tables`.
        local_rotation: see :func:`lane_rotations`.
        slow_rotation: see :func:`slow_rotations`.
    """

    k_factor: torch.Tensor
    k_bias: torch.Tensor | None
    base_rotation: torch.Tensor
    local_rotation: torch.Tensor
    slow_rotation: torch.Tensor


@dataclass(frozen=True, slots=True)
class HopperLayer:
    """What the torch op ``decode_hopper`` is told of a layer; ``lean``: by a lean kernel."""

    tensors: HopperTensors
    sizes: LayerSizes
    scalars: LayerScalars
    lean: bool


def pack_hopper_layer(layer: LatentLayer, k_columns: torch.Tensor | None = None) -> HopperLayer:
    """Pack a layer's constants.

    Args:
        k_columns: where latents are in bands, :attr:`~.hopper_bands.BandTables.k_columns`.

    Raises:
        KernelUnavailableError: the kernel cannot rotate keys as the layer's table does.
    """
    plain = layer.k_bias is None and not layer.key_scales and not layer.soft_cap
    layer = small_keys(layer)
    packed: PackedLayer = pack_layer(layer)
    device = layer.k_up.device
    rotations = rotation_tables(layer.cos_sin_cache, layer.head_dim, device, TILE)
    if rotations is None:
        raise KernelUnavailableError(
            "cos_sin_cache: expected angles proportional to the position, found others"
        )
    base, local = rotations
    terms, errors = slow_rotations(local)
    # Pairs turn more slowly from one to the next; those that RoPE leaves alone come last.
    turning = errors > SLOW_ERROR[layer.k_up.dtype]
    fast = int((turning * torch.arange(1, len(errors) + 1, device=errors.device)).max())
    lean = plain and fast <= layer.head_dim // 4
    # Cosines and sines of fast pairs are halves, so that keys cannot overflow as they are turned.
    terms[: layer.head_dim // (4 if lean else 2)] = torch.tensor(
        [2.0, 0.0, 1.0, 0.0], device=device
    )
    members = member_order(layer.head_dim)
    order = pair_order(layer.head_dim, layer.rot_dim, layer.is_neox)[members].to(device)
    bias = packed.tensors.k_bias
    if bias is not None:
        unit = 1.0 if k_columns is None else 2.0**-KEY_SCALE
        bias = (unit * bias[:, members.to(device)]).contiguous()
    rows = layer.k_up.reshape(-1, layer.head_dim, layer.k_up.shape[2])[:, order]
    if k_columns is None:
        factor = swizzle_rows(rows, SWIZZLED_COLUMNS)
    else:
        index = k_columns.to(device)[:, :, None].expand(-1, -1, layer.head_dim, -1)
        in_slots = rows[:, None].expand_as(index).gather(3, index)
        unit = 2.0 ** (ELEMENT_SCALE - KEY_SCALE)
        factor = swizzle_rows((unit * in_slots.float()).half(), BLOCK_COLUMNS)
    return HopperLayer(
        tensors=HopperTensors(
            k_factor=factor,
            k_bias=bias,
            base_rotation=base,
            local_rotation=lane_rotations(local),
            slow_rotation=terms.contiguous(),
        ),
        sizes=packed.sizes,
        scalars=packed.scalars,
        lean=lean,
    )


def swizzle_rows(rows: torch.Tensor, columns: int) -> torch.Tensor:
    """``[..., ceil(width / columns), n, columns]`` of ``[..., n, width]``, as ``wgmma`` reads them.

    Rows have 128 or 64 bytes. Of row ``n``, the 16 bytes that are ``i``-th lie at ``i ^ n % 8``, or
    at ``i ^ n // 2 % 4``. Columns past the width are zeros.
    """
    count, width = rows.shape[-2:]
    rows = torch.nn.functional.pad(rows, (0, -width % columns))
    words = rows.unflatten(-1, (-1, columns // 8, 8)).transpose(-4, -3)
    place = torch.arange(columns // 8)
    row = torch.arange(count)[:, None] * columns // SWIZZLED_COLUMNS % (columns // 8)
    index = (place ^ row).to(rows.device)[..., None].expand(count, columns // 8, 8)
    return words.gather(-2, index.expand_as(words)).flatten(-2).contiguous()


def member_order(head_dim: int) -> torch.Tensor:
    """Columns of a head in pair order, as the kernel has them: of every eight pairs, the first
    members and then the second ones."""
    return torch.arange(head_dim).view(-1, 8, 2).transpose(1, 2).flatten()


def lane_rotations(local: torch.Tensor) -> torch.Tensor:
    """``[d/16, 4, 32, 8]`` float16 of ``[64, d/2, 2]``: what each lane of four warps turns keys by.

    Lane ``4g + t`` of warp ``w`` has the pairs ``8m + 2t`` and ``8m + 2t + 1`` of the tokens
    ``16w + g`` and ``16w + g + 8``: of each token, halves of both cosines, then of both sines.
    """
    parts = local.reshape(4, 2, 8, -1, 4, 2, 2)  # warp, half, g, m, t, pair, (cos, sin)
    lanes = parts.permute(3, 0, 2, 4, 1, 6, 5).reshape(-1, 4, 32, 8)
    return (lanes / 2).half().contiguous()


def slow_rotations(local: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotations by ``x`` positions from a tile's middle as ``a + b·x·i``, pair by pair.

    Args:
        local: ``[64, d/2, 2]``, by the place in the tile.

    Returns:
        ``[d/2, 4]`` float32: ``a``, ``b / a``, and the rotation to the middle; and the largest
        error within a tile ``[d/2]``. ``a`` halves the error of the cosine, ``b`` is least squares.
    """
    turn = torch.view_as_complex(local.double())
    middle = turn[TILE // 2]
    from_middle = turn * middle.conj()
    x = torch.arange(-TILE // 2, TILE // 2, device=local.device).double()[:, None]
    a = (from_middle.real.amax(dim=0) + from_middle.real.amin(dim=0)) / 2
    b = (x * from_middle.imag).sum(dim=0) / x.square().sum()
    errors = (from_middle - torch.complex(a.expand_as(x * b), x * b)).abs().amax(dim=0)
    return torch.stack((a, b / a, middle.real, middle.imag), dim=1).float(), errors
