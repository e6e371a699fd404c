"""How kernels cut the columns of spans into chunks; plain Python, no Triton."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from recalkv_vllm.band_format import PLANES, BandFormat, band_bytes
from recalkv_vllm.span import Span

#: ``(low bits, byte, high bits, byte)``: the planes of latents in bands, and where the codes of a
#: column start in each, counted from the first code byte of its span. No high bits are 0; not in
#: bands, all is 0.
Planes = tuple[int, int, int, int]
#: ``(offset, size, *planes)`` of a power of two of columns. Flat, for Triton 3.6 has no deeper
#: tuples than a tuple of these.
Chunk = tuple[int, int, int, int, int, int]
#: ``(start, step, *planes, end)`` of columns that are stored alike and read ``step`` at a time.
Stream = tuple[int, int, int, int, int, int, int]
#: Columns of one load and one matrix product at most; more are several chunks.
LARGEST_CHUNK = 128


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is not below ``n``."""
    return 1 << (n - 1).bit_length()


def power_of_2_chunks(start: int, end: int) -> tuple[tuple[int, int], ...]:
    """``(offset, size)`` of power-of-two chunks, 16 to 128 wide, that tile ``[start, end)``.

    Widths that are no power of two (176 = 128 + 32 + 16) then need no mask and no padding.
    """
    chunks = []
    while start < end:
        size = min(LARGEST_CHUNK, 1 << ((end - start).bit_length() - 1))
        chunks.append((start, size))
        start += size
    return tuple(chunks)


class Run(NamedTuple):
    """Neighboring columns of a span that are stored alike: a band, or all if there are none."""

    start: int
    end: int
    planes: Planes = (0, 0, 0, 0)

    def chunks(self, low: int, high: int) -> tuple[Chunk, ...]:
        """Chunks of those of its columns that are in ``[low, high)``."""
        cuts = power_of_2_chunks(max(low, self.start), min(high, self.end))
        return tuple((offset, size, *self.planes_at(offset)) for offset, size in cuts)

    def planes_at(self, column: int) -> Planes:
        """Planes from ``column``, a multiple of 16, on."""
        low, low_byte, high, high_byte = self.planes
        past = column - self.start
        return low, low_byte + past * low // 8, high, high_byte + past * high // 8


def runs_of(width: int, latent_format: BandFormat | None) -> tuple[Run, ...]:
    """Runs of ``width`` columns: one, or the bands of ``latent_format``, which are as wide."""
    if latent_format is None:
        return (Run(0, width),)
    runs = []
    column = byte = 0
    for band in latent_format.bands:
        low, high = (*PLANES[band.bits], 0)[:2]
        planes = (low, byte, high, byte + band.columns * low // 8)
        runs.append(Run(column, column + band.columns, planes))
        column, byte = column + band.columns, byte + band_bytes(band)
    return tuple(runs)


def runs_of_span(span: Span, latent_format: BandFormat | None) -> tuple[Run, ...]:
    """Runs of a span of a latent that has the bands of ``latent_format``, if any."""
    return runs_of(span.width, None if latent_format is None else latent_format.within(span))


def cut_runs(runs: tuple[Run, ...], low: int, high: int) -> tuple[Chunk, ...]:
    """Chunks of the columns in ``[low, high)``; none has columns of two runs."""
    return tuple(chunk for run in runs for chunk in run.chunks(low, high))


def streams_of(runs: tuple[Run, ...], columns: int) -> tuple[Stream, ...]:
    """The runs, read up to ``columns`` at a time."""
    return tuple(
        (start, min(columns, (end - start) & (start - end)), *planes, end)
        for start, end, planes in runs
    )


@dataclass(frozen=True, slots=True)
class Columns:
    """How the kernel cuts a K and a V span; offsets count from the start of the span.

    Args:
        k: chunks, each with the index of the V chunk with the same columns, or -1.
        v: chunks, offsets within one block of ``v_block`` columns.
        v_block: V columns per program.
        k_runs: runs of the K span.
    """

    k: tuple[tuple[int, int, int, int, int, int, int], ...]
    v: tuple[Chunk, ...]
    v_block: int
    k_runs: tuple[Run, ...]

    def streams(self, columns: int) -> tuple[Stream, ...]:
        """The K runs, read up to ``columns`` at a time."""
        return streams_of(self.k_runs, columns)


@cache
def plan_columns(
    k_spans: tuple[Span, ...],
    v_spans: tuple[Span, ...],
    v_block: int,
    block: int = 0,
    latent_format: BandFormat | None = None,
) -> Columns:
    """Cut spans so that what K and V share is loaded once.

    Args:
        k_spans: of every KV head, equally wide and with the same bands.
        v_spans: likewise.
        v_block: V columns per program, a divisor of the V spans' width.
        block: which of the blocks; without bands all are cut alike.
        latent_format: bands of the latent, if it has any.

    Columns are shared where the two spans lie alike for every head (equal, nested or overlapping
    spans); otherwise both are loaded, the second time from L1 or L2.
    """
    k_width, v_width = k_spans[0].width, v_spans[0].width
    k_runs, v_runs = (
        runs_of_span(k_spans[0], latent_format),
        runs_of_span(v_spans[0], latent_format),
    )
    shifts = {k.start - v.start for k, v in zip(k_spans, v_spans, strict=True)}
    shift = shifts.pop()
    low, high = max(0, shift), min(v_width, shift + k_width)
    if shifts or low >= high or v_block < v_width:
        k = tuple((*chunk, -1) for chunk in cut_runs(k_runs, 0, k_width))
        first = block * v_block
        cuts = cut_runs(v_runs, first, first + v_block)
        v = tuple((chunk[0] - first, *chunk[1:]) for chunk in cuts)
        return Columns(k, v, v_block, k_runs)
    before, both = cut_runs(v_runs, 0, low), cut_runs(k_runs, low - shift, high - shift)
    v = before + cut_runs(v_runs, low, high) + cut_runs(v_runs, high, v_width)
    k = tuple((*chunk, len(before) + i) for i, chunk in enumerate(both))
    rest = cut_runs(k_runs, 0, low - shift) + cut_runs(k_runs, high - shift, k_width)
    return Columns(k + tuple((*chunk, -1) for chunk in rest), v, v_width, k_runs)
