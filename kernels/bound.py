"""The attention op with its constants packed: from the op's arguments to kernel launches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from recalkv_vllm.kernels import heuristics, layout
from recalkv_vllm.kernels.attention import latent_attention
from recalkv_vllm.kernels.launch import Launch, merge_launch, reserve_workspace
from recalkv_vllm.ops.dispatch import BoundAttention
from recalkv_vllm.ops.layer import NO_HINTS, BatchHints, LatentLayer


@dataclass(frozen=True, slots=True)
class Part:
    """Sequences of one call that share a launch: from ``first`` on, ``count`` of them.

    ``tokens`` is the range of rows of ``q`` that they own; no sequence has more than ``queries``
    of them if ``bounded``, else ``queries`` is only what is usual.
    """

    first: int
    count: int
    tokens: range
    queries: int
    bounded: bool


class PagedLatentAttention(BoundAttention):
    """``paged_latent_attention`` of one layer; see :mod:`recalkv_vllm.ops.reference`.

    Args:
        target: device to choose launch parameters for, that of the factors if not given.
    """

    def __init__(self, layer: LatentLayer, target: heuristics.Target | None = None):
        device = layer.k_up.device
        self.target = target or heuristics.target_of(device)
        self.k_width, self.v_width = layer.k_width, layer.v_width
        self.head_dim, self.group_size = layer.head_dim, layer.k_group_size
        self.num_kv_heads = layer.num_kv_heads
        self.heads_per_v = self.num_kv_heads // len(layer.v_spans)
        self.dim = max(16, layout.next_power_of_2(layer.head_dim))
        self.rot_half = layer.rot_dim // 2
        self.latent_format = layer.latent_format
        heads = range(self.num_kv_heads)
        self.k_starts = tuple(layer.k_spans[h // self.group_size][0] for h in heads)
        self.v_starts = tuple(layer.v_spans[h // self.heads_per_v][0] for h in heads)
        starts = torch.tensor([self.k_starts, self.v_starts], dtype=torch.int32).T // 16

        columns = layout.paired_columns(layer.head_dim, layer.rot_dim, layer.is_neox)
        padded = torch.zeros(self.dim, dtype=torch.int32)
        padded[: layer.head_dim] = columns
        factors = layer.k_up.reshape(self.num_kv_heads, layer.head_dim, self.k_width)
        rope, bias, norm = layer.cos_sin_cache, layer.k_bias, layer.k_norm_weight
        self.local_rotation = (
            None if rope is None else layout.local_rotation(rope, self.dim, layer.k_up.dtype)
        )

        def packed(vectors: torch.Tensor | None) -> torch.Tensor | None:
            return None if vectors is None else layout.pack_heads(vectors, columns, self.dim)

        self.constants = {
            "k_up": packed(factors),
            "k_bias": packed(bias),
            "k_norm_weight": packed(None if norm is None else norm[None]),
            "first_columns": starts.contiguous().to(device),
            "head_columns": padded.to(device),
            "rope_table": None if rope is None else rope.contiguous(),
            "stride_rope": layer.rot_dim,
            "scale": layer.scale,
            "soft_cap": layer.soft_cap,
            "norm_eps": layer.k_norm_eps,
            "WINDOW": layer.sliding_window or 0,
        }

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
        o_lat = q.new_empty(tokens, num_heads, self.v_width, dtype=torch.float32)
        lse = q.new_empty(tokens, num_heads, dtype=torch.float32)
        num_seqs, decode_tokens = seq_lens.shape[0], hints.num_decode_tokens
        parts = (
            Part(0, hints.num_decodes, range(decode_tokens), hints.max_decode_query_len, True),
            self._rest(hints.num_decodes, num_seqs, range(decode_tokens, tokens)),
        )
        inputs = (q, kv_cache, block_table, seq_lens, query_start_loc)
        for part in parts:
            if part.count and part.tokens:
                for launch in self.launches(part, *inputs, o_lat, lse, hints.max_seq_len):
                    launch.run()
        return o_lat, lse

    @staticmethod
    def _rest(first: int, num_seqs: int, tokens: range) -> Part:
        count = num_seqs - first
        usual = layout.next_power_of_2(max(1, len(tokens) // max(1, count)))
        return Part(first, count, tokens, usual, False)

    def shape(self, num_heads: int) -> heuristics.AttentionShape:
        """What launch parameters depend on."""
        columns = self.columns(self.v_width)
        return heuristics.AttentionShape(
            queries_per_kv=num_heads // self.num_kv_heads,
            num_kv_heads=self.num_kv_heads,
            k_group_size=self.group_size,
            heads_per_v=self.heads_per_v,
            dim=self.dim,
            k_width=self.k_width,
            v_width=self.v_width,
            itemsize=self.constants["k_up"].element_size(),
            shared_columns=sum(size for _, size, shared in columns.k if shared >= 0),
            local_rope=self.local_rotation is not None,
            rope=self.rot_half > 0,
            key_bias=self.constants["k_bias"] is not None,
            key_norm=self.constants["k_norm_weight"] is not None,
            code_bits=None if self.latent_format is None else self.latent_format.bits,
        )

    def columns(self, v_block: int) -> layout.Columns:
        """Chunks of the spans for programs that own ``v_block`` value columns."""
        return layout.plan_columns(
            self.k_starts, self.v_starts, self.k_width, self.v_width, v_block
        )

    def reserve(
        self, num_heads: int, max_num_seqs: int, max_decode_query_len: int, max_seq_len: int
    ) -> None:
        nbytes = self.workspace_bytes(num_heads, max_num_seqs, max_decode_query_len, max_seq_len)
        reserve_workspace(self.constants["k_up"].device, nbytes)

    def workspace_bytes(
        self, num_heads: int, max_num_seqs: int, max_decode_query_len: int, max_seq_len: int
    ) -> int:
        """Largest workspace that any call needs, with up to ``max_num_seqs`` decodes."""
        shape = self.shape(num_heads)
        config = heuristics.attention_config(shape, self.target, max_decode_query_len)
        decode = max(
            self._workspace_bytes(
                self._splits(config, num_heads, count, max_seq_len),
                count * max_decode_query_len * num_heads,
            )
            for count in range(1, max_num_seqs + 1)
        )
        programs = heuristics.most_programs(self.target)
        prefill = max(
            4 * programs * config.rows * (config.v_block + 1)
            for config in (heuristics.attention_config(shape, self.target, 2**i) for i in range(8))
        )
        return max(decode, prefill)

    def _workspace_bytes(self, splits: int, rows: int) -> int:
        return 4 * splits * rows * (self.v_width + 1) if splits > 1 else 0

    def _splits(
        self, config: heuristics.AttentionConfig, num_heads: int, blocks: int, max_seq_len: int
    ) -> int:
        programs = blocks * self.num_kv_heads // config.heads * self.v_width // config.v_block
        return heuristics.split_count(programs, triton.cdiv(max_seq_len, config.tile), self.target)

    def launches(
        self,
        part: Part,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        o_lat: torch.Tensor,
        lse: torch.Tensor,
        max_seq_len: int | None = None,
    ) -> Iterator[Launch]:
        """The launches that compute ``part`` of a call into ``o_lat`` and ``lse``."""
        num_heads = q.shape[1]
        block_size = kv_cache.shape[1]
        config = heuristics.attention_config(self.shape(num_heads), self.target, part.queries)
        search = not part.bounded or config.query_block < part.queries
        blocks = part.count
        if search:
            block = config.query_block
            blocks += part.tokens.stop // block - part.tokens.start // block
        splits = self._splits(
            config, num_heads, blocks, max_seq_len or block_table.shape[1] * block_size
        )
        out, out_lse = o_lat, lse
        if splits > 1:
            rows = len(part.tokens) * num_heads
            space = reserve_workspace(q.device, self._workspace_bytes(splits, rows))
            numbers = space[: self._workspace_bytes(splits, rows)].view(torch.float32)
            cut = splits * rows * self.v_width
            out = numbers[:cut].view(splits, len(part.tokens), num_heads, self.v_width)
            out_lse = numbers[cut:].view(splits, len(part.tokens), num_heads)
        columns = self.columns(config.v_block)
        form, codes, scales = self.latent_format, kv_cache, None
        if form is not None:
            codes, scales = form.split_cache(kv_cache)
        head_blocks = self.num_kv_heads // config.heads
        v_blocks = self.v_width // config.v_block
        yield Launch(
            latent_attention,
            (blocks * head_blocks * v_blocks, splits),
            {
                **self.constants,
                "q": q,
                "kv_cache": codes,
                "scales": scales,
                "block_table": block_table[part.first :],
                "seq_lens": seq_lens[part.first :],
                "query_start_loc": query_start_loc[part.first :],
                "local_rotation": self.local_rotation if config.local_rope else None,
                "out": out,
                "lse": out_lse,
                "num_seqs": part.count,
                "num_splits": splits,
                "first_token": part.tokens.start if splits > 1 else 0,
                "stride_q_token": q.stride(0),
                "stride_q_head": q.stride(1),
                "stride_block": codes.stride(0),
                "stride_slot": codes.stride(1),
                "stride_scale_block": 0 if scales is None else scales.stride(0),
                "stride_scale_slot": 0 if scales is None else scales.stride(1),
                "stride_table": block_table.stride(0),
                "stride_out_split": out.stride(0) if splits > 1 else 0,
                "stride_lse_split": out_lse.stride(0) if splits > 1 else 0,
                "NUM_HEADS": num_heads,
                "QUERIES_PER_KV": num_heads // self.num_kv_heads,
                "HEADS": config.heads,
                "GROUP": min(config.heads, self.group_size),
                "HEAD_DIM": self.head_dim,
                "DIM": self.dim,
                "ROT_HALF": self.rot_half,
                "K_WIDTH": self.k_width,
                "V_WIDTH": self.v_width,
                "V_BLOCK": config.v_block,
                "K_CHUNKS": columns.k,
                "V_CHUNKS": columns.v,
                "QUERY_BLOCK": config.query_block,
                "ROWS": config.rows,
                "TILE": config.tile,
                "BLOCK_SIZE": block_size,
                "CODEC": None if form is None else form.dtype,
                "RANK": 0 if form is None else form.rank_of(kv_cache.shape[2]),
                "SCALE_SHIFT": 0 if form is None else form.scale_shift,
                "LOCAL_ROPE": config.local_rope,
                "SEARCH": search,
                "STREAM": config.stream,
                "STAGES": config.stages,
            },
            config.warps,
            config.stages,
        )
        if splits > 1:
            owned = slice(part.tokens.start, part.tokens.stop)
            yield merge_launch(out, out_lse, o_lat[owned], lse[owned])
