"""Host side of the kernels' data layout: how factors are packed and spans cut into chunks.

Runs once, when weights are loaded; plain torch and Python, no Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

Span = tuple[int, int]
#: Columns of one load and one matrix product at most; more are several chunks.
LARGEST_CHUNK = 128
#: Rows of the tile-local rotation table: no tile is larger.
LARGEST_TILE = 128


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is not below ``n``."""
    return 1 << (n - 1).bit_length()


def power_of_2_chunks(start: int, end: int) -> tuple[Span, ...]:
    """``(offset, size)`` of power-of-two chunks, 16 to 128 wide, that tile ``[start, end)``.

    Widths that are no power of two (176 = 128 + 32 + 16) then need no mask and no padding.
    """
    chunks = []
    while start < end:
        size = min(LARGEST_CHUNK, 1 << ((end - start).bit_length() - 1))
        chunks.append((start, size))
        start += size
    return tuple(chunks)


@dataclass(frozen=True, slots=True)
class Columns:
    """How the kernel cuts a K and a V span; offsets count from the start of the span.

    Args:
        k: ``(offset, size, index of the V chunk with the same columns, or -1)``.
        v: ``(offset, size)``, within one block of ``v_block`` columns.
    """

    k: tuple[tuple[int, int, int], ...]
    v: tuple[Span, ...]
    v_block: int


@cache
def plan_columns(k_starts: tuple[int, ...], v_starts: tuple[int, ...], k_width: int, v_width: int,
                 v_block: int) -> Columns:  # fmt: skip
    """Cut spans so that what K and V share is loaded once.

    Args:
        k_starts: start of the K span of every KV head; v_starts: of its V span.
        v_block: V columns per program, a divisor of ``v_width``.

    Columns are shared where the two spans lie alike for every head (equal, nested or overlapping
    spans); otherwise both are loaded, the second time from L1 or L2.
    """
    shifts = {k - v for k, v in zip(k_starts, v_starts, strict=True)}
    shift = shifts.pop()
    low, high = max(0, shift), min(v_width, shift + k_width)
    if shifts or low >= high or v_block < v_width:
        k = tuple((offset, size, -1) for offset, size in power_of_2_chunks(0, k_width))
        return Columns(k, power_of_2_chunks(0, v_block), v_block)
    v = power_of_2_chunks(0, low) + power_of_2_chunks(low, high) + power_of_2_chunks(high, v_width)
    index = {chunk: i for i, chunk in enumerate(v) if low <= chunk[0] < high}
    k = tuple((offset - shift, size, i) for (offset, size), i in index.items())
    rest = power_of_2_chunks(0, low - shift) + power_of_2_chunks(high - shift, k_width)
    return Columns(k + tuple((offset, size, -1) for offset, size in rest), v, v_width)


def paired_columns(head_dim: int, rot_dim: int, is_neox: bool) -> torch.Tensor:
    """Columns of a head, reordered so that the members of every rotated pair are neighbours."""
    columns = torch.arange(head_dim)
    if is_neox:
        columns[:rot_dim] = columns[:rot_dim].view(2, -1).T.flatten()
    return columns


def pack_heads(x: torch.Tensor, columns: torch.Tensor, dim: int) -> torch.Tensor:
    """``[heads, d, *]`` as ``[heads, dim, *]``, in the order of ``columns`` and padded with zeros.

    ``dim`` is ``d`` padded to a power of two; zeros drop out of every product.
    """
    packed = x.new_zeros(x.shape[0], dim, *x.shape[2:])
    packed[:, : columns.shape[0]] = x[:, columns.to(x.device)]
    return packed


def local_rotation(
    cos_sin_cache: torch.Tensor, dim: int, dtype: torch.dtype
) -> torch.Tensor | None:
    """``[LARGEST_TILE, 2, dim / 2]``: cosines and sines of a token's offset in its tile.

    The rotation at position ``p + j`` must be the one at ``p`` times that at offset ``j`` (up to a
    constant magnitude, as YaRN has); this is checked on rows all over the table, to the rounding of
    ``dtype``. Returns None if it does not hold or the table is shorter than a tile.
    """
    positions, rot_dim = cos_sin_cache.shape
    if positions < LARGEST_TILE:
        return None
    table = torch.complex(*cos_sin_cache.float().split(rot_dim // 2, dim=1)).to(torch.complex128)
    offsets = table[:LARGEST_TILE] / table[0].real
    bases = torch.arange(0, positions - LARGEST_TILE + 1, LARGEST_TILE, device=table.device)
    picked = bases[
        torch.linspace(0, len(bases) - 1, 64, dtype=torch.float64, device=table.device).long()
    ]
    rows = picked[:, None] + torch.arange(LARGEST_TILE, device=table.device)
    error = (table[picked][:, None] * offsets - table[rows]).abs().max()
    rounding = torch.finfo(dtype).eps
    if not error <= 2 * rounding * table[0].real.abs().max():
        return None
    packed = torch.zeros(LARGEST_TILE, 2, dim // 2, dtype=torch.float32, device=table.device)
    packed[:, 0] = 1
    packed[:, 0, : rot_dim // 2] = offsets.real
    packed[:, 1, : rot_dim // 2] = offsets.imag
    return packed.to(dtype)
