"""Prompts of a batch as the host knows them, and the slices of context that they attend to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch

from recalkv_vllm.ops import Batch, Pieces


class Stretch(NamedTuple):
    """Tokens ``[start, end)`` of a sequence."""

    start: int
    end: int


def cut_context(
    queries: Sequence[int], lengths: Sequence[int], capacity: int, window: int | None = None
) -> list[list[Stretch]] | None:
    """Cut contexts into slices of at most ``capacity`` tokens, the newest first.

    A slice has a stretch of each sequence, which may be empty. The first has all queries, so that a
    causal mask belongs to it alone; every later one lies before all queries of its sequence.

    Args:
        queries: of each sequence, its newest tokens; no more than ``capacity`` in all.
        lengths: of each sequence, queries included.
        window: a query sees this many newest keys, itself included.

    Returns:
        The slices, or None: a window's mask moves with the query, and what windows see does not fit
        into one slice.
    """
    if window is not None:
        pairs = zip(queries, lengths, strict=True)
        newest = [Stretch(max(0, n - q - window + 1), n) for q, n in pairs]
        return [newest] if sum(n - start for start, n in newest) <= capacity else None
    share = (capacity - sum(queries)) // len(queries)
    pairs = zip(queries, lengths, strict=True)
    slices = [[Stretch(max(0, n - q - share), n) for q, n in pairs]]
    while left := sum(stretch.start > 0 for stretch in slices[-1]):
        share = capacity // left
        slices.append([Stretch(max(0, end - share), end) for end, _ in slices[-1]])
    return slices


@dataclass(frozen=True, slots=True)
class ContextSlice:
    """What one call of attention reads: pieces of the cache, of ``longest`` tokens at most."""

    pieces: Pieces
    longest: int


class Prefills:
    """The sequences of a batch that are not decodes; worked out when first asked for.

    Args:
        batch: with all its hints.
        query_start_loc_cpu: its ``query_start_loc``.
        seq_lens_cpu: its ``seq_lens``, exact but for decodes.
    """

    def __init__(self, batch: Batch, query_start_loc_cpu: torch.Tensor, seq_lens_cpu: torch.Tensor):
        self._batch = batch
        self._query_start_loc_cpu, self._seq_lens_cpu = query_start_loc_cpu, seq_lens_cpu
        self._cut: dict[tuple[int, int | None], list[ContextSlice] | None] = {}

    @cached_property
    def queries(self) -> list[int]:
        """Of each sequence."""
        starts_cpu = self._query_start_loc_cpu[self._batch.num_decodes :]
        return starts_cpu.diff().tolist()

    @cached_property
    def lengths(self) -> list[int]:
        """Cached tokens of each sequence, its queries' included; 0 where it has no queries."""
        lengths = self._seq_lens_cpu[self._batch.num_decodes :].tolist()
        return [n if count else 0 for count, n in zip(self.queries, lengths, strict=False)]

    @cached_property
    def query_start_loc(self) -> torch.Tensor:
        """``[num_seqs + 1]`` int32, from 0 on."""
        batch = self._batch
        return batch.query_start_loc[batch.num_decodes :] - batch.num_decode_tokens

    @cached_property
    def num_tokens(self) -> int:
        return sum(self.queries)

    @cached_property
    def longest(self) -> int:
        """Queries of the sequence that has most."""
        return max(self.queries)

    @cached_property
    def mean_queries(self) -> float:
        """Queries of a sequence that has any, on average."""
        return self.num_tokens / max(1, sum(count > 0 for count in self.queries))

    def slices(self, capacity: int, window: int | None) -> list[ContextSlice] | None:
        """:func:`cut_context`, on the device; the layers of a model ask for the same ones."""
        key = (capacity, window)
        if key not in self._cut:
            cut = cut_context(self.queries, self.lengths, capacity, window)
            self._cut[key] = None if cut is None else list(self._on_device(cut))
        return self._cut[key]

    def _on_device(self, slices: list[list[Stretch]]) -> Iterator[ContextSlice]:
        count, block_table = len(self.queries), self._batch.block_table[self._batch.num_decodes :]
        numbers: list[int] = []
        for stretches in slices:
            numbers += (stretch.start for stretch in stretches)
            numbers += accumulate((end - start for start, end in stretches), initial=0)
        device = block_table.device
        host = torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
        on_device = host.to(device, non_blocking=True).view(len(slices), 2 * count + 1)
        for row, stretches in zip(on_device, slices, strict=True):
            sizes = [end - start for start, end in stretches]
            pieces = Pieces(block_table, row[:count], row[count:], sum(sizes))
            yield ContextSlice(pieces, max(sizes))
