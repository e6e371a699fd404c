"""How the attention kernel cuts the columns of spans into chunks; plain Python, no Triton."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from recalkv_vllm.span import Span

#: ``(offset, size)`` of a power of two of columns.
Chunk = tuple[int, int]
#: Columns of one load and one matrix product at most; more are several chunks.
LARGEST_CHUNK = 128


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is not below ``n``."""
    return 1 << (n - 1).bit_length()


def power_of_2_chunks(start: int, end: int) -> tuple[Chunk, ...]:
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
    v: tuple[Chunk, ...]
    v_block: int


@cache
def plan_columns(k_spans: tuple[Span, ...], v_spans: tuple[Span, ...], v_block: int) -> Columns:
    """Cut spans so that what K and V share is loaded once.

    Args:
        k_spans: of every KV head, equally wide.
        v_spans: likewise.
        v_block: V columns per program, a divisor of the V spans' width.

    Columns are shared where the two spans lie alike for every head (equal, nested or overlapping
    spans); otherwise both are loaded, the second time from L1 or L2.
    """
    k_width, v_width = k_spans[0].width, v_spans[0].width
    shifts = {k.start - v.start for k, v in zip(k_spans, v_spans, strict=True)}
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
