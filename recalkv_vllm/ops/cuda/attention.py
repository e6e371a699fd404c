"""One layer's ops on an NVIDIA GPU with CUDA C++ for decode: from the contract to launches."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

from recalkv_vllm.kernels import heuristics
from recalkv_vllm.kernels.heuristics import AttentionShape, Target
from recalkv_vllm.key_scales import split_pages
from recalkv_vllm.ops.contract import Batch, BatchLimits, KernelUnavailableError, LatentLayer
from recalkv_vllm.ops.cuda.hopper_layout import HopperLayer
from recalkv_vllm.ops.cuda.layout import PackedLayer, pack_layer, tile_columns
from recalkv_vllm.ops.cuda.plan import MAX_QUERIES, batch_bounds, plan, row_blocks
from recalkv_vllm.ops.cuda.shapes import LayerShape, Limits, Plan
from recalkv_vllm.ops.triton.merge import merge_launch
from recalkv_vllm.ops.triton.warm_up import empty_batch
from recalkv_vllm.ops.triton.work_list import Cut, Partial, work_list
from recalkv_vllm.ops.workspace import partial_bytes


@cache
def device_limits(device: torch.device) -> Limits:
    """Read off what plans depend on."""
    properties: Any = torch.cuda.get_device_properties(device)
    return Limits(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        properties.shared_memory_per_multiprocessor,
    )


class Choice(NamedTuple):
    """How a batch is attended.

    Args:
        columns: the table of the plan's tiles.
        cut: how cached tokens are cut into pieces; None if they are not.
    """

    plan: Plan
    columns: torch.Tensor
    cut: Cut | None


class DecodeAttention:
    """Decode attention of one layer in CUDA C++.

    Raises:
        KernelUnavailableError: the kernel cannot serve this layer; says why.
    """

    #: Formats of latents that the kernel reads.
    formats: tuple[type, ...] = (type(None),)
    format_names: tuple[str, ...] = ("None",)
    packed: PackedLayer | HopperLayer

    def __init__(self, layer: LatentLayer):
        if not isinstance(layer.latent_format, self.formats):
            found = None if layer.latent_format is None else layer.latent_format.dtype
            names = " or ".join(self.format_names)
            raise KernelUnavailableError(f"latent_format: expected {names}, found {found}")
        self.device = device = layer.k_up.device
        self.dtype, self.head_dim = layer.k_up.dtype, layer.head_dim
        shape = LayerShape.of(layer)
        self.limits = device_limits(device)
        self.num_kv_heads, self.v_width = layer.num_kv_heads, layer.v_width
        self.key_scales = layer.key_scales
        self.window = layer.sliding_window or 0
        plans = self.prepare(layer, shape)
        if plans[1] is None:
            raise KernelUnavailableError(
                f"k_spans, v_spans: expected widths that fit {self.limits.shared_bytes} bytes of "
                f"shared memory, found {layer.k_width} and {layer.v_width}"
            )
        self.plans = {
            tiles: (p, self.columns(shape, p).to(device)) for tiles, p in plans.items() if p
        }

    def prepare(self, layer: LatentLayer, shape: LayerShape) -> dict[int, Plan | None]:
        """Pack the layer's constants; returns plans by tiles of query rows."""
        self.packed = pack_layer(layer)
        return {tiles: plan(shape, self.limits, tiles) for tiles in (1, 2)}

    def columns(self, shape: LayerShape, plan: Plan) -> torch.Tensor:
        """The table of a plan's tiles: see :func:`~.layout.tile_columns`."""
        return tile_columns(shape, plan)

    def elements(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """The cache as rows of 16-bit elements, one per token."""
        return kv_cache

    def last_arguments(self) -> tuple[Any, ...]:
        """What the op takes after the layer's scalars."""
        return ()

    @property
    def op(self) -> Any:
        """The torch op that starts the kernel."""
        return torch.ops.recalkv_cuda.decode

    def preferred(self, shape: AttentionShape, target: Target, queries: int) -> bool:
        """Whether this kernel is predicted to be faster than Triton's.

        Args:
            queries: per sequence, at most.
        """
        return heuristics.prefers_cuda(shape, target, queries)

    def run(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: Batch,
        o_lat: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """Attend all of a batch, whatever its query lengths; writes ``o_lat`` and ``lse``."""
        choice = self._choice(q, kv_cache, batch)
        if choice.cut is None:
            self._start(choice, q, kv_cache, batch, o_lat, lse)
        else:
            merge_launch(self._pieces(choice, choice.cut, q, kv_cache, batch), o_lat, lse).run()

    def partial(
        self, q: torch.Tensor, kv_cache: torch.Tensor, batch: Batch
    ) -> Partial | tuple[torch.Tensor, torch.Tensor]:
        """The same before pieces are merged.

        Returns:
            Results of pieces; of a call that is not cut, ``o_lat: [tokens, h_q, v_width]`` and
            ``lse: [tokens, h_q]``.
        """
        choice = self._choice(q, kv_cache, batch)
        if choice.cut is not None:
            return self._pieces(choice, choice.cut, q, kv_cache, batch)
        tokens, num_heads, _ = q.shape
        o_lat = q.new_empty(tokens, num_heads, self.v_width, dtype=torch.float32)
        lse = q.new_empty(tokens, num_heads, dtype=torch.float32)
        self._start(choice, q, kv_cache, batch, o_lat, lse)
        return o_lat, lse

    def _pieces(
        self, choice: Choice, cut: Cut, q: torch.Tensor, kv_cache: torch.Tensor, batch: Batch
    ) -> Partial:
        work, cutting = work_list(batch, range(batch.num_seqs), range(len(q)), cut)
        for launch in cutting:
            launch.run()
        partial = Partial.of(work, self.num_kv_heads, self.v_width)
        self._start(choice, q, kv_cache, batch, partial.o_lat, partial.lse, work.pieces)
        return partial

    def _start(
        self,
        choice: Choice,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: Batch,
        out: torch.Tensor,
        lse: torch.Tensor,
        pieces: torch.Tensor | None = None,
    ) -> None:
        """Launch attention into ``out`` and ``lse``, which with ``pieces`` are partial results."""
        latents, key_scales = split_pages(kv_cache, self.key_scales)
        kv_cache = self.elements(latents)
        if kv_cache.data_ptr() % 16 or kv_cache.stride(0) % 8 or kv_cache.stride(1) % 8:
            raise ValueError(
                "kv_cache: expected 16-byte aligned rows, found "
                f"address {kv_cache.data_ptr():#x} and strides {kv_cache.stride()}"
            )
        packed = self.packed
        self.op(
            q,
            kv_cache,
            key_scales,
            batch.block_table,
            batch.seq_lens,
            batch.query_start_loc,
            pieces,
            *packed.tensors,
            choice.columns,
            out,
            lse,
            packed.sizes,
            choice.plan.kernel_shape(),
            *packed.scalars,
            *self.last_arguments(),
        )

    def warm_up(self, kv_cache: torch.Tensor, limits: BatchLimits) -> int:
        """Run every kernel once, since CUDA loads them when first called; returns how many.

        One token's rows and those of many take different plans.
        """
        for tokens in (1, MAX_QUERIES):
            shape = (tokens, limits.num_heads)
            q = torch.zeros(*shape, self.head_dim, dtype=self.dtype, device=self.device)
            o_lat = q.new_empty(*shape, self.v_width, dtype=torch.float32)
            lse = q.new_empty(shape, dtype=torch.float32)
            self.run(q, kv_cache, empty_batch(tokens, limits, self.device), o_lat, lse)
        return 2

    def _choice(self, q: torch.Tensor, kv_cache: torch.Tensor, batch: Batch) -> Choice:
        tokens, num_heads, _ = q.shape
        return self.choose(tokens, batch.num_seqs, num_heads, batch.longest(kv_cache.shape[1]))

    def choose(self, tokens: int, num_seqs: int, num_heads: int, max_seq_len: int) -> Choice:
        """How a batch is attended."""
        per_kv = num_heads // self.num_kv_heads
        few = self.plans[1][0].columns * num_seqs
        tiles = 2 if tokens * per_kv > few and 2 in self.plans else 1
        plan, columns = self.plans[tiles]
        blocks = row_blocks(plan, tokens, num_seqs, per_kv)
        bounds = batch_bounds(plan, self.limits, blocks, max_seq_len)
        if bounds is None:
            return Choice(plan, columns, None)
        cut = Cut(plan.columns, per_kv, plan.turn_tokens, self.window, bounds)
        return Choice(plan, columns, cut)

    def workspace_bytes(self, limits: BatchLimits) -> int:
        """Largest workspace that decode batches within ``limits`` need."""
        most = 0
        for seqs in range(1, limits.num_seqs + 1):
            for queries in range(1, limits.decode_query_len + 1):
                cut = self.choose(seqs * queries, seqs, limits.num_heads, limits.seq_len).cut
                if cut is not None:
                    rows = cut.bounds.capacity * self.num_kv_heads * cut.rows
                    most = max(most, partial_bytes(rows, self.v_width))
        return most
