"""One layer's attention in Triton: from the contract's arguments to kernel launches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from recalkv_vllm.kernels import heuristics
from recalkv_vllm.kernels.attention import latent_attention
from recalkv_vllm.kernels.columns import Columns
from recalkv_vllm.ops.contract import Batch, BatchLimits, LatentLayer
from recalkv_vllm.ops.triton.launch import Launch
from recalkv_vllm.ops.triton.layout import (
    cache_arguments,
    kernel_constants,
    local_rotation,
    with_whole_spans,
)
from recalkv_vllm.ops.triton.merge import merge_launch
from recalkv_vllm.ops.triton.plan import AttentionPlanner, LaunchPlan, Part
from recalkv_vllm.ops.triton.spills import SpillFree
from recalkv_vllm.ops.triton.value_up import Values, merged_value_up_launch, value_up_launch
from recalkv_vllm.ops.triton.work_list import Partial, WorkList, work_list
from recalkv_vllm.ops.workspace import clear_rows, reserve_workspace

FLOAT = torch.float32


class TritonAttention:
    """Attention of one layer.

    Args:
        target: device to choose launch parameters for, that of the factors if not given.
    """

    def __init__(self, layer: LatentLayer, target: heuristics.Target | None = None):
        self.device, self.dtype = layer.k_up.device, layer.k_up.dtype
        self.latent_format = layer.latent_format
        self.group_size = layer.k_group_size
        target = target or heuristics.target_of(self.device)
        attended = with_whole_spans(layer, target)
        #: Of the layer as it is, for other kernels.
        self.constants = kernel_constants(layer)
        self._constants = self.constants if attended is layer else kernel_constants(attended)
        rope = layer.cos_sin_cache
        self.local_rotation = (
            None if rope is None else local_rotation(rope, self.constants["DIM"], layer.k_up.dtype)
        )
        self.planner = AttentionPlanner(
            attended, target, local_rope=self.local_rotation is not None
        )
        self._spill_free: SpillFree[heuristics.AttentionConfig] = SpillFree()

    def attend(
        self, q: torch.Tensor, kv_cache: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`BoundLayer.attend`."""
        tokens, num_heads, _ = q.shape
        o_lat = q.new_empty(tokens, num_heads, self.planner.v_width, dtype=FLOAT)
        lse = q.new_empty(tokens, num_heads, dtype=FLOAT)
        self.run(Part.decodes(batch), q, kv_cache, batch, o_lat, lse)
        self.run(Part.rest(batch, tokens), q, kv_cache, batch, o_lat, lse)
        return o_lat, lse

    def attend_heads(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: Batch,
        values: Values,
        heads: torch.Tensor,
    ) -> None:
        """See :meth:`BoundLayer.attend_heads`; writes ``heads: [tokens, h_q, d]``."""
        for part in (Part.decodes(batch), Part.rest(batch, len(q))):
            self.run_heads(part, q, kv_cache, batch, values, heads)

    def run(
        self,
        part: Part,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: Batch,
        o_lat: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """Attend ``part`` of a batch; writes its rows of ``o_lat`` and ``lse``, all of them."""
        if not part.count:
            clear_rows(o_lat, lse, part.tokens)
        elif part.tokens:
            for launch in self.launches(part, q, kv_cache, batch, o_lat, lse):
                launch.run()

    def run_heads(
        self,
        part: Part,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: Batch,
        values: Values,
        heads: torch.Tensor,
    ) -> None:
        """The same, of head outputs; writes its rows of ``heads: [tokens, h_q, d]``."""
        if not part.count:
            heads[part.tokens.start : part.tokens.stop] = 0
        elif part.tokens:
            for launch in self.head_launches(part, q, kv_cache, batch, values, heads):
                launch.run()

    def reserve(self, limits: BatchLimits) -> None:
        """See :meth:`BoundLayer.reserve`."""
        reserve_workspace(self.device, self.planner.workspace_bytes(limits))

    def prefers_dense(self, num_heads: int, queries: float) -> bool:
        """See :meth:`BoundLayer.prefers_dense`."""
        shape = self.planner.shape(num_heads)
        return heuristics.prefers_dense(shape, self.planner.target, queries)

    def new_queries(self, tokens: int, num_heads: int) -> torch.Tensor:
        """Zeros ``[tokens, h_q, d]`` of the queries' dtype."""
        shape = (tokens, num_heads, self.constants["HEAD_DIM"])
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def launches(
        self,
        part: Part,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: Batch,
        o_lat: torch.Tensor,
        lse: torch.Tensor,
    ) -> Iterator[Launch]:
        """The launches that compute ``part`` of a call into ``o_lat`` and ``lse``."""
        owned = slice(part.tokens.start, part.tokens.stop)
        plan = self._plan(part, q, kv_cache, batch)
        if plan.cut is None:
            yield from self._attention(plan, part, q, kv_cache, batch, o_lat[owned], lse[owned])
            return
        work, cutting = work_list(batch, part.sequences, part.tokens, plan.cut)
        yield from cutting
        pieces = Partial.of(work, self.planner.num_kv_heads, self.planner.v_width)
        yield from self._attention(plan, part, q, kv_cache, batch, pieces.o_lat, pieces.lse, work)
        yield merge_launch(pieces, o_lat[owned], lse[owned])

    def head_launches(
        self,
        part: Part,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: Batch,
        values: Values,
        heads: torch.Tensor,
    ) -> Iterator[Launch]:
        """The launches that compute head outputs of ``part`` into ``heads: [tokens, h_q, d]``.

        Value latents of a call that is not cut into pieces are rounded to the queries' dtype, in
        which they are projected; those of pieces are merged where they are projected.
        """
        own_heads = heads[part.tokens.start : part.tokens.stop]
        plan = self._plan(part, q, kv_cache, batch)
        if plan.cut is None:
            rows = (len(part.tokens), q.shape[1])
            o_lat, lse = q.new_empty(*rows, self.planner.v_width), q.new_empty(rows, dtype=FLOAT)
            yield from self._attention(plan, part, q, kv_cache, batch, o_lat, lse)
            yield value_up_launch(o_lat, values, own_heads, lse)
            return
        work, cutting = work_list(batch, part.sequences, part.tokens, plan.cut)
        yield from cutting
        pieces = Partial.of(work, self.planner.num_kv_heads, self.planner.v_width)
        yield from self._attention(plan, part, q, kv_cache, batch, pieces.o_lat, pieces.lse, work)
        yield merged_value_up_launch(pieces, values, own_heads)

    def _plan(
        self, part: Part, q: torch.Tensor, kv_cache: torch.Tensor, batch: Batch
    ) -> LaunchPlan:
        return self.planner.plan(part, q.shape[1], batch.longest(kv_cache.shape[1]))

    def _attention(
        self,
        plan: LaunchPlan,
        part: Part,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: Batch,
        out: torch.Tensor,
        lse: torch.Tensor,
        work: WorkList | None = None,
    ) -> Iterator[Launch]:
        """Launches into the part's rows of ``out: [rows, h_q, v_width]`` and ``lse: [rows, h_q]``;
        of a work list into its partial results."""
        planner, num_heads = self.planner, q.shape[1]
        head_blocks = planner.num_kv_heads // plan.config.heads
        arguments = {
            **self._constants,
            **cache_arguments(kv_cache, self.latent_format, self._constants["KEY_SCALES"]),
            "q": q,
            "block_table": batch.block_table[part.first :],
            "seq_lens": batch.seq_lens[part.first :],
            "query_start_loc": batch.query_start_loc[part.first :],
            "pieces": None if work is None else work.pieces,
            "out": out,
            "lse": lse,
            "num_seqs": part.count,
            "first_token": part.tokens.start,
            "end_token": part.tokens.stop,
            "stride_q_token": q.stride(0),
            "stride_q_head": q.stride(1),
            "stride_table": batch.block_table.stride(0),
            "NUM_HEADS": num_heads,
            "QUERIES_PER_KV": num_heads // planner.num_kv_heads,
            "SEARCH": plan.search and work is None,
        }
        blocks, pieces = (plan.blocks, 1) if work is None else (1, len(work.pieces))
        kind = (plan.config, num_heads, kv_cache.shape[1], out.dtype, work is None, plan.search)
        for v_blocks, columns in plan.columns:
            grid = (blocks * head_blocks * len(v_blocks), pieces)
            own = arguments | {"V_BLOCKS": len(v_blocks), "FIRST_V_BLOCK": v_blocks.start}
            yield self._spill_free.launch(
                (*kind, v_blocks.start),
                heuristics.leaner_attention(planner.shape(num_heads), plan.config, planner.target),
                partial(self._launch, grid, own, columns),
            )

    def _launch(
        self,
        grid: tuple[int, ...],
        arguments: dict[str, Any],
        columns: Columns,
        config: heuristics.AttentionConfig,
    ) -> Launch:
        """With what follows from launch parameters, besides ``arguments``."""
        arguments = arguments | {
            "local_rotation": self.local_rotation if config.local_rope else None,
            "HEADS": config.heads,
            "GROUP": min(config.heads, self.group_size),
            "V_BLOCK": config.v_block,
            "QUERY_BLOCK": config.query_block,
            "ROWS": config.rows,
            "TILE": config.tile,
            "LOCAL_ROPE": config.local_rope,
            "STREAM": config.stream,
            "LATE_VALUES": config.late_values,
            "STAGES": config.stages,
            "K_CHUNKS": columns.k,
            "K_STREAMS": columns.streams(config.stream),
            "V_CHUNKS": columns.v,
        }
        return Launch(latent_attention, grid, arguments, config.warps, config.stages)
