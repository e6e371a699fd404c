"""The batch of decodes that kernels are timed on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recalkv_vllm.band_format import BandFormat, slot_width
from recalkv_vllm.ops.contract import Batch, BatchLimits, LatentLayer

BLOCK_SIZE = 16
#: As many sequences, tokens of each and bytes of cache at most.
MOST_SEQS = 32
MOST_TOKENS = 4096
MOST_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Slot:
    """A token's slot in a layer's cache: ``width`` elements."""

    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, layer: LatentLayer) -> Slot:
        """As wide as the columns that are read need."""
        coded = layer.latent_format
        rank = max(span.end for span in (*layer.k_spans, *layer.v_spans))
        if isinstance(coded, BandFormat):
            rank = coded.rank
        width = slot_width(coded, rank, layer.k_up.dtype, layer.key_scales)
        return cls(width, layer.k_up.dtype if coded is None else torch.uint8)


@dataclass(frozen=True, slots=True)
class Trial:
    """How a layer's decodes are tried: ``num_seqs`` of ``queries`` over ``tokens`` each."""

    slot: Slot
    num_seqs: int
    tokens: int
    queries: int
    num_heads: int

    @classmethod
    def of(cls, slot: Slot, limits: BatchLimits) -> Trial:
        """The largest within ``limits`` and the constants above."""
        tokens, queries = min(limits.seq_len, MOST_TOKENS), limits.decode_query_len
        seq_bytes = _blocks(tokens) * BLOCK_SIZE * slot.width * slot.dtype.itemsize
        fitting = min(MOST_SEQS, MOST_BYTES // seq_bytes)
        num_seqs = min(limits.num_seqs, limits.num_tokens // queries, fitting)
        return cls(slot, max(1, num_seqs), tokens, queries, limits.num_heads)

    def call(self, dtype: torch.dtype, head_dim: int, device: torch.device) -> Call:
        """Its tensors, of zeros: values do not matter, sizes do."""
        blocks = _blocks(self.tokens)
        pages = torch.arange(self.num_seqs * blocks, dtype=torch.int32, device=device)
        starts = torch.arange(self.num_seqs + 1, dtype=torch.int32, device=device)
        batch = Batch(
            block_table=pages.view(self.num_seqs, blocks),
            seq_lens=torch.full((self.num_seqs,), self.tokens, dtype=torch.int32, device=device),
            query_start_loc=starts * self.queries,
            num_decodes=self.num_seqs,
            num_decode_tokens=self.num_seqs * self.queries,
            max_decode_query_len=self.queries,
            max_seq_len=self.tokens,
        )
        rows = (self.num_seqs * self.queries, self.num_heads, head_dim)
        cache = (len(pages), BLOCK_SIZE, self.slot.width)
        return Call(
            torch.zeros(rows, dtype=dtype, device=device),
            torch.zeros(cache, dtype=self.slot.dtype, device=device),
            batch,
        )


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments of :meth:`BoundLayer.attend_heads`."""

    q: torch.Tensor
    kv_cache: torch.Tensor
    batch: Batch


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)
