"""The memory of a CUDA graph: a dummy batch while it is captured, a padded one when replayed."""

from __future__ import annotations

import torch

from tests.ops.cases import MAX_POSITION, AttentionCase, build, spanned

#: Queries per sequence of a graph, and ``(queries, cached tokens)`` of the batch it is replayed on.
PADDED = {
    "decode": (1, ((1, 45), (1, 177), (1, 1), (1, 300), (0, 0), (0, 0))),
    "verification": (3, ((3, 45), (2, 2), (1, 1), (3, 200), (0, 0))),
}


class GraphMemory:
    """Inputs of one call, as vLLM holds them while it captures a graph of it.

    Requests without tokens and block 0 for all; :meth:`show_batch` puts the batch there.
    """

    def __init__(self, name: str, dtype: torch.dtype, device: torch.device | str):
        queries, batch = PADDED[name]
        tokens = len(batch) * queries
        self.case: AttentionCase = spanned(
            name, (8, 2, 64), 1, 48, 2, 32, batch=batch,
            padding_rows=tokens - sum(count for count, _ in batch),
        )  # fmt: skip
        self.inputs = build(self.case, dtype, device).change(
            num_decodes=len(batch),
            num_decode_tokens=tokens,
            max_decode_query_len=queries,
            max_seq_len=MAX_POSITION,
        )
        q, held = self.inputs.q, self.inputs.batch
        self._held = (q, held.block_table, held.seq_lens, held.query_start_loc)
        self._batch = [tensor.clone() for tensor in self._held]
        q.zero_()
        held.block_table.zero_()
        held.seq_lens.fill_(queries)
        held.query_start_loc.copy_(torch.arange(0, tokens + 1, queries))

    def show_batch(self) -> None:
        """What vLLM does before it replays the graph."""
        for tensor, content in zip(self._held, self._batch, strict=True):
            tensor.copy_(content)
