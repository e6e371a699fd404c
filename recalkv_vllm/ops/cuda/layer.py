"""One layer's ops on an NVIDIA GPU: decode in CUDA C++ where that is faster, else in Triton."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import torch

from recalkv_vllm.ops.contract import Batch, BatchLimits, LatentLayer
from recalkv_vllm.ops.cuda.attention import DecodeAttention
from recalkv_vllm.ops.cuda.choice import choose
from recalkv_vllm.ops.cuda.identity import layout_of
from recalkv_vllm.ops.cuda.plan import MAX_QUERIES
from recalkv_vllm.ops.cuda.trial import Slot, Trial
from recalkv_vllm.ops.triton.attention import TritonAttention
from recalkv_vllm.ops.triton.cache_and_values import CacheAndValues
from recalkv_vllm.ops.triton.layout import kernel_constants
from recalkv_vllm.ops.triton.plan import Part
from recalkv_vllm.ops.triton.value_up import merged_value_up_launch, value_up_launch
from recalkv_vllm.ops.triton.warm_up import head_launches, run_all
from recalkv_vllm.ops.triton.work_list import Partial
from recalkv_vllm.ops.workspace import clear_rows, reserve_workspace


class CudaLayer(CacheAndValues):
    """The ops of one layer: decode in CUDA C++ if it is the faster one, the rest in Triton.

    The batches that :meth:`reserve` is told of are decoded by the kernel that was measured to be
    faster, others and those of a device that cannot be asked by the one that is predicted to be.

    Without ``triton``, CUDA C++ attends all: right for any batch, slow for long queries.
    """

    def __init__(self, layer: LatentLayer, decode: DecodeAttention, triton: TritonAttention | None):
        super().__init__(layer, kernel_constants(layer) if triton is None else triton.constants)
        self.decode, self.triton = decode, triton
        self.layout = layout_of(layer)
        self._slot = Slot.of(layer)
        self._chosen: dict[tuple[int, int], bool] = {}

    def decodes(self, num_heads: int, queries: int) -> bool:
        """Whether CUDA C++ decodes ``queries`` of ``num_heads`` heads per sequence."""
        if self.triton is None:
            return True
        chosen = self._chosen.get((num_heads, queries))
        return self._predicted(self.triton, num_heads, queries) if chosen is None else chosen

    def _predicted(self, triton: TritonAttention, num_heads: int, queries: int) -> bool:
        planner = triton.planner
        shape = planner.shape(num_heads)
        return self.decode.preferred(shape, planner.target, queries)

    def prefers_dense(self, num_heads: int, queries: float) -> bool:
        return self.triton is not None and self.triton.prefers_dense(num_heads, queries)

    def reserve(self, limits: BatchLimits) -> None:
        reserve_workspace(self.decode.device, self.decode.workspace_bytes(limits))
        if self.triton is not None:
            self.triton.reserve(limits)
            self._choose(self.triton, limits)

    def _choose(self, triton: TritonAttention, limits: BatchLimits) -> None:
        """Settle, before memory is profiled and graphs are captured, who decodes."""
        num_heads, queries = limits.num_heads, limits.decode_query_len
        trial = Trial.of(self._slot, limits)

        def calls() -> dict[str, Callable[[], object]]:
            call = trial.call(self.decode.dtype, self.decode.head_dim, self.decode.device)
            heads = torch.empty_like(call.q)
            shared = call.q, call.kv_cache, call.batch
            return {
                "cuda": lambda: self._decode_heads(*shared, heads),
                "triton": lambda: triton.attend_heads(*shared, self.values, heads),
            }

        shape = triton.planner.shape(num_heads)
        what = (
            f"{queries} queries by {num_heads} heads, {shape.num_kv_heads} KV heads in K groups of "
            f"{shape.k_group_size}, spans of {shape.k_width} and {shape.v_width} columns"
        )
        self._chosen[num_heads, queries] = choose(
            self.decode.device,
            self._predicted(triton, num_heads, queries),
            calls,
            what,
            layer=self.layout,
            trial=trial,
            plans=[plan for plan, _ in self.decode.plans.values()],
            sizes=self.decode.packed.sizes,
            shape=shape,
        )

    def warm_up(self, kv_cache: torch.Tensor, limits: BatchLimits) -> int:
        decodes = self.decodes(limits.num_heads, limits.decode_query_len)
        launches = self.first_launches(kv_cache, limits, merged=True)
        if self.triton is not None:
            attention = head_launches(
                self.triton, kv_cache, limits, self.values, decodes=not decodes
            )
            launches = chain(attention, launches)
        loaded = self.decode.warm_up(kv_cache, limits) if decodes else 0
        return loaded + run_all(launches)

    def attend(
        self, q: torch.Tensor, kv_cache: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, num_heads, _ = q.shape
        if self.triton is not None and not self.decodes(num_heads, batch.max_decode_query_len):
            return self.triton.attend(q, kv_cache, batch)
        o_lat = q.new_empty(tokens, num_heads, self.decode.v_width, dtype=torch.float32)
        lse = q.new_empty(tokens, num_heads, dtype=torch.float32)
        batch = self._with_decodes(tokens, batch)
        owned = slice(batch.num_decode_tokens)
        if batch.num_decodes and batch.num_decode_tokens:
            decodes = batch.first(batch.num_decodes)
            self.decode.run(q[owned], kv_cache, decodes, o_lat[owned], lse[owned])
        rest = Part.rest(batch, tokens)
        if self.triton is not None:
            self.triton.run(rest, q, kv_cache, batch, o_lat, lse)
        else:
            clear_rows(o_lat, lse, rest.tokens)
        return o_lat, lse

    def attend_heads(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: Batch,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        tokens, num_heads, _ = q.shape
        heads = torch.empty_like(q) if out is None else out
        if self.triton is not None and not self.decodes(num_heads, batch.max_decode_query_len):
            self.triton.attend_heads(q, kv_cache, batch, self.values, heads)
            return heads
        batch = self._with_decodes(tokens, batch)
        owned = slice(batch.num_decode_tokens)
        if batch.num_decodes and batch.num_decode_tokens:
            decodes = batch.first(batch.num_decodes)
            self._decode_heads(q[owned], kv_cache, decodes, heads[owned])
        rest = Part.rest(batch, tokens)
        if self.triton is not None:
            self.triton.run_heads(rest, q, kv_cache, batch, self.values, heads)
        else:
            heads[rest.tokens.start : rest.tokens.stop] = 0
        return heads

    def _decode_heads(
        self, q: torch.Tensor, kv_cache: torch.Tensor, batch: Batch, heads: torch.Tensor
    ) -> None:
        """Head outputs of a batch of decodes by CUDA C++; writes ``heads: [tokens, h_q, d]``."""
        result = self.decode.partial(q, kv_cache, batch)
        if isinstance(result, Partial):
            merged_value_up_launch(result, self.values, heads).run()
        else:
            o_lat, lse = result
            value_up_launch(o_lat, self.values, heads, lse).run()

    def _with_decodes(self, tokens: int, batch: Batch) -> Batch:
        """The batch with all that CUDA C++ attends as decodes: without hints, few queries each."""
        num_seqs = batch.num_seqs
        if self.triton is None or (batch.num_decodes == 0 and tokens <= MAX_QUERIES * num_seqs):
            owned = tokens if num_seqs else 0
            return replace(batch, num_decodes=num_seqs, num_decode_tokens=owned)
        return batch
