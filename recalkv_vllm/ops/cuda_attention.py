"""The CUDA decode kernel with a layer's constants packed: from the op's arguments to launches."""

from __future__ import annotations

from functools import cache

import torch

from recalkv_vllm.kernels.bound import PagedLatentAttention, Part
from recalkv_vllm.kernels.launch import reserve_workspace
from recalkv_vllm.ops.cuda_layout import pack_factor, pair_order, rotation_tables, tile_columns
from recalkv_vllm.ops.cuda_plan import Layer, Limits, Plan, plan, split_count
from recalkv_vllm.ops.dispatch import BoundAttention, KernelUnavailableError
from recalkv_vllm.ops.layer import NO_HINTS, BatchHints, LatentLayer

#: More queries per sequence than this, on average, are prefill.
MAX_QUERIES = 16
NO_WINDOW = 1 << 30


@cache
def device_limits(device: torch.device) -> Limits:
    """Read off what plans depend on."""
    properties = torch.cuda.get_device_properties(device)
    return Limits(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        properties.shared_memory_per_multiprocessor,
    )


class DecodeAttention:
    """Decode attention of one layer in CUDA C++.

    Raises:
        KernelUnavailableError: the kernel cannot serve this layer; says why.
    """

    def __init__(self, layer: LatentLayer):
        if layer.latent_format is not None:
            raise KernelUnavailableError(
                f"latent_format: expected None, found {layer.latent_format.dtype}"
            )
        self.device = device = layer.k_up.device
        sizes = Layer.of(layer)
        self.limits = device_limits(device)
        self.num_kv_heads, self.v_width = layer.num_kv_heads, layer.v_width
        plans = {tiles: plan(sizes, self.limits, tiles) for tiles in (1, 2)}
        if plans[1] is None:
            raise KernelUnavailableError(
                f"k_spans, v_spans: expected widths that fit {self.limits.shared_bytes} bytes of "
                f"shared memory, found {layer.k_width} and {layer.v_width}"
            )
        rotations = rotation_tables(layer.cos_sin_cache, layer.head_dim, device)
        if rotations is None:
            raise KernelUnavailableError(
                "cos_sin_cache: expected angles proportional to the position, found others"
            )
        self.plans = {
            tiles: (p, tile_columns(sizes, p).to(device)) for tiles, p in plans.items() if p
        }
        order = pair_order(layer.head_dim, layer.rot_dim, layer.is_neox).to(device)
        norm, norm_factor = None, 1.0
        if layer.k_norm_weight is not None:
            # Keys are rounded before they are normed: below their own magnitude they cannot
            # overflow float16.
            norm_factor = 2 * float(layer.k_norm_weight.abs().max()) or 1.0
            norm = (layer.k_norm_weight.float() / norm_factor)[order].contiguous()
        bias = None if layer.k_bias is None else layer.k_bias.float()[:, order].contiguous()
        factor = pack_factor(layer.k_up, layer.head_dim, order)
        self.constants = (factor, bias, norm, *rotations)
        self.sizes = (
            layer.k_width,
            self.v_width,
            layer.rot_dim // 2 if layer.is_neox else 0,
            layer.sliding_window or NO_WINDOW,
            0 if layer.cos_sin_cache is None else layer.head_dim,
        )
        self.numbers = (layer.scale, layer.soft_cap or 0.0, layer.k_norm_eps, norm_factor)

    def run(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        o_lat: torch.Tensor,
        lse: torch.Tensor,
        max_seq_len: int,
    ) -> None:
        """Attend all of a batch, whatever its query lengths; writes ``o_lat`` and ``lse``."""
        if kv_cache.data_ptr() % 16 or kv_cache.stride(0) % 8 or kv_cache.stride(1) % 8:
            raise ValueError(
                "kv_cache: expected 16-byte aligned rows, found "
                f"address {kv_cache.data_ptr():#x} and strides {kv_cache.stride()}"
            )
        tokens, num_heads, _ = q.shape
        chosen, columns, splits = self._plan(tokens, block_table.shape[0], num_heads, max_seq_len)
        out, out_lse = o_lat, lse
        if splits > 1:
            rows = tokens * num_heads
            space = reserve_workspace(q.device, 4 * splits * rows * (self.v_width + 1))
            numbers = space[: 4 * splits * rows * (self.v_width + 1)].view(torch.float32)
            out, out_lse = numbers.split([splits * rows * self.v_width, splits * rows])
        shape = (
            chosen.column_tiles,
            chosen.v_tiles,
            chosen.heads,
            chosen.teams,
            chosen.stages,
            chosen.tile_width,
            splits,
            int(chosen.resident),
            chosen.shared_bytes,
        )
        inputs = (q, kv_cache, block_table, seq_lens, query_start_loc)
        torch.ops.recalkv_cuda.decode(
            *inputs, *self.constants, columns, out, out_lse, self.sizes, shape, *self.numbers
        )
        if splits > 1:
            torch.ops.recalkv_cuda.merge(out, out_lse, o_lat, lse, splits)

    def _plan(
        self, tokens: int, num_seqs: int, num_heads: int, max_seq_len: int
    ) -> tuple[Plan, torch.Tensor, int]:
        """Plan, its tile columns, and splits for a batch."""
        rows = tokens * (num_heads // self.num_kv_heads)
        tiles = 2 if rows > 8 * num_seqs and 2 in self.plans else 1
        chosen, columns = self.plans[tiles]
        row_blocks = max(num_seqs, -(-rows // chosen.columns))
        return chosen, columns, split_count(chosen, self.limits, row_blocks, max_seq_len)

    def workspace_bytes(
        self, num_heads: int, max_num_seqs: int, max_decode_query_len: int, max_seq_len: int
    ) -> int:
        """Largest workspace that decode batches of up to ``max_num_seqs`` sequences need."""
        most = 0
        for seqs in range(1, max_num_seqs + 1):
            for queries in range(1, max_decode_query_len + 1):
                tokens = seqs * queries
                splits = self._plan(tokens, seqs, num_heads, max_seq_len)[2]
                if splits > 1:
                    most = max(most, 4 * splits * tokens * num_heads * (self.v_width + 1))
        return most


class CudaAttention(BoundAttention):
    """``paged_latent_attention`` of one layer: decode in CUDA C++, prefill by ``prefill``.

    Without ``prefill``, CUDA C++ runs all: right for any batch, slow for long queries.
    """

    def __init__(self, decode: DecodeAttention, prefill: PagedLatentAttention | None):
        self.decode, self.prefill = decode, prefill

    def reserve(
        self, num_heads: int, max_num_seqs: int, max_decode_query_len: int, max_seq_len: int
    ) -> None:
        batch = (num_heads, max_num_seqs, max_decode_query_len, max_seq_len)
        reserve_workspace(self.decode.device, self.decode.workspace_bytes(*batch))
        if self.prefill is not None:
            self.prefill.reserve(*batch)

    def __call__(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        hints: BatchHints = NO_HINTS,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, num_heads, _ = q.shape
        num_seqs = seq_lens.shape[0]
        o_lat = q.new_empty(tokens, num_heads, self.decode.v_width, dtype=torch.float32)
        lse = q.new_empty(tokens, num_heads, dtype=torch.float32)
        if tokens == 0 or num_seqs == 0:
            return o_lat, lse
        longest = hints.max_seq_len or block_table.shape[1] * kv_cache.shape[1]
        num_decodes, num_decode_tokens = hints.num_decodes, hints.num_decode_tokens
        if self.prefill is None or (num_decodes == 0 and tokens <= MAX_QUERIES * num_seqs):
            num_decodes, num_decode_tokens = num_seqs, tokens
        if num_decodes and num_decode_tokens:
            self.decode.run(
                q[:num_decode_tokens],
                kv_cache,
                block_table[:num_decodes],
                seq_lens[:num_decodes],
                query_start_loc[: num_decodes + 1],
                o_lat[:num_decode_tokens],
                lse[:num_decode_tokens],
                longest,
            )
        rest = range(num_decode_tokens, tokens)
        if self.prefill is not None and num_decodes < num_seqs and rest:
            count = num_seqs - num_decodes
            usual = 1 << (max(1, len(rest) // count) - 1).bit_length()
            part = Part(num_decodes, count, rest, usual, False)
            inputs = (q, kv_cache, block_table, seq_lens, query_start_loc, o_lat, lse)
            for launch in self.prefill.launches(part, *inputs, hints.max_seq_len):
                launch.run()
        return o_lat, lse
