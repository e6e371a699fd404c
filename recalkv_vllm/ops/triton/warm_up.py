"""Every launch that a layer can reach: Triton compiles a kernel, for a second or so, at its first.

What a kernel is compiled for follows from the layer, the cache and the launch rules. Of a batch,
those look at the decodes' query length, the usual query length of the rest, and rows of values. All
of them are tried here, on a sequence of no tokens, which reads nothing from the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from recalkv_vllm.kernels import heuristics
from recalkv_vllm.ops.contract import Batch, BatchLimits
from recalkv_vllm.ops.triton.attention import TritonAttention
from recalkv_vllm.ops.triton.launch import INTERPRETED, Launch
from recalkv_vllm.ops.triton.plan import Part
from recalkv_vllm.ops.triton.value_up import Values


def run_all(launches: Iterable[Launch]) -> int:
    """Run launches, and count them. The interpreter has nothing to compile and runs none."""
    count = 0
    for launch in () if INTERPRETED else launches:
        launch.run()
        count += 1
    return count


def empty_batch(queries: int, limits: BatchLimits, device: torch.device) -> Batch:
    """One sequence of ``queries`` queries and, as far as a kernel can see, no cached tokens."""
    starts = torch.tensor([0, queries], dtype=torch.int32, device=device)
    nothing = torch.zeros(1, dtype=torch.int32, device=device)
    return Batch(nothing[None], nothing, starts, max_seq_len=limits.seq_len)


def parts_to_warm(limits: BatchLimits, *, decodes: bool) -> list[Part]:
    """Parts of batches that between them get every launch; ``decodes``: those of decodes, too."""
    parts = [Part(0, 1, range(n), n, bounded=False) for n in heuristics.query_lengths()]
    if decodes:
        length = limits.decode_query_len
        parts.append(Part(0, 1, range(length), length, bounded=True))
    return parts


def head_launches(
    attention: TritonAttention,
    kv_cache: torch.Tensor,
    limits: BatchLimits,
    values: Values,
    *,
    decodes: bool,
) -> Iterator[Launch]:
    """The launches that compute head outputs, whether cached tokens are cut into pieces or not;
    ``decodes`` says whether decodes are Triton's too."""
    for part in parts_to_warm(limits, decodes=decodes):
        q = attention.new_queries(len(part.tokens), limits.num_heads)
        heads = torch.empty_like(q)
        for seq_len in (1, limits.seq_len):
            batch = empty_batch(part.queries, replace(limits, seq_len=seq_len), q.device)
            yield from attention.head_launches(part, q, kv_cache, batch, values, heads)
