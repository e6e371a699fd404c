"""The memory of a CUDA graph: a dummy batch while it is captured, a padded one when replayed."""

from __future__ import annotations

import torch

from recalkv_vllm.ops.layer import BatchHints
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
        self.inputs = build(self.case, dtype, device)
        self.hints = BatchHints(len(batch), tokens, queries, MAX_POSITION)
        held = self.inputs.call
        del held["kv_cache"]
        self._held = held
        self._batch = {name: tensor.clone() for name, tensor in held.items()}
        held["q"].zero_()
        held["block_table"].zero_()
        held["seq_lens"].fill_(queries)
        held["query_start_loc"].copy_(torch.arange(0, tokens + 1, queries))

    def show_batch(self) -> None:
        """What vLLM does before it replays the graph."""
        for name, tensor in self._held.items():
            tensor.copy_(self._batch[name])
