"""The attention op with its constants packed: from the op's arguments to kernel launches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton

from recalkv_vllm.kernels import heuristics, layout
from recalkv_vllm.kernels.attention import latent_attention
from recalkv_vllm.kernels.launch import Launch, merge_launch, reserve_workspace

Span = tuple[int, int]


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


class PagedLatentAttention:
    """``paged_latent_attention`` of one layer; see :mod:`recalkv_vllm.ops.reference`.

    Args:
        target: device to choose launch parameters for, that of ``k_up`` if not given.
    """

    def __init__(
        self,
        k_up: torch.Tensor,
        k_spans: Sequence[Span],
        v_spans: Sequence[Span],
        *,
        head_dim: int,
        scale: float,
        cos_sin_cache: torch.Tensor | None,
        is_neox: bool,
        k_bias: torch.Tensor | None,
        k_norm_weight: torch.Tensor | None,
        k_norm_eps: float,
        sliding_window: int | None,
        soft_cap: float | None,
        target: heuristics.Target | None = None,
    ):
        device = k_up.device
        self.target = target or heuristics.target_of(device)
        groups, group_rows, self.k_width = k_up.shape
        self.v_width = v_spans[0][1] - v_spans[0][0]
        self.head_dim = head_dim
        self.group_size = group_rows // head_dim
        self.num_kv_heads = groups * self.group_size
        self.heads_per_v = self.num_kv_heads // len(v_spans)
        self.dim = max(16, layout.next_power_of_2(head_dim))
        self.rot_half = 0 if cos_sin_cache is None else cos_sin_cache.shape[1] // 2
        heads = range(self.num_kv_heads)
        self.k_starts = tuple(k_spans[h // self.group_size][0] for h in heads)
        self.v_starts = tuple(v_spans[h // self.heads_per_v][0] for h in heads)
        starts = torch.tensor([self.k_starts, self.v_starts], dtype=torch.int32).T // 16

        columns = layout.paired_columns(head_dim, 2 * self.rot_half, is_neox)
        padded = torch.zeros(self.dim, dtype=torch.int32)
        padded[:head_dim] = columns
        factors = k_up.reshape(self.num_kv_heads, head_dim, self.k_width)
        self.local_rotation = (
            None
            if cos_sin_cache is None
            else layout.local_rotation(cos_sin_cache, self.dim, k_up.dtype)
        )
        self.constants = {
            "k_up": layout.pack_heads(factors, columns, self.dim),
            "k_bias": None if k_bias is None else layout.pack_heads(k_bias, columns, self.dim),
            "k_norm_weight": None
            if k_norm_weight is None
            else layout.pack_heads(k_norm_weight[None], columns, self.dim),
            "first_columns": starts.contiguous().to(device),
            "head_columns": padded.to(device),
            "rope_table": None if cos_sin_cache is None else cos_sin_cache.contiguous(),
            "stride_rope": 2 * self.rot_half,
            "scale": scale,
            "soft_cap": soft_cap,
            "norm_eps": k_norm_eps,
            "WINDOW": sliding_window or 0,
        }

    def __call__(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        *,
        num_decodes: int = 0,
        num_decode_tokens: int = 0,
        max_decode_query_len: int = 1,
        max_seq_len: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend; the keywords are host-side knowledge that only makes it faster.

        Args:
            num_decodes: this many first sequences have few queries each and
            num_decode_tokens: own exactly this many first rows of ``q``,
            max_decode_query_len: at most this many each.
            max_seq_len: bound on ``seq_lens``; what the block table can hold if not given.
        """
        tokens, num_heads, _ = q.shape
        o_lat = q.new_empty(tokens, num_heads, self.v_width, dtype=torch.float32)
        lse = q.new_empty(tokens, num_heads, dtype=torch.float32)
        num_seqs = seq_lens.shape[0]
        parts = (
            Part(0, num_decodes, range(num_decode_tokens), max_decode_query_len, True),
            self._rest(num_decodes, num_seqs, range(num_decode_tokens, tokens)),
        )
        inputs = (q, kv_cache, block_table, seq_lens, query_start_loc)
        for part in parts:
            if part.count and part.tokens:
                for launch in self.launches(part, *inputs, o_lat, lse, max_seq_len):
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
        )

    def columns(self, v_block: int) -> layout.Columns:
        """Chunks of the spans for programs that own ``v_block`` value columns."""
        return layout.plan_columns(
            self.k_starts, self.v_starts, self.k_width, self.v_width, v_block
        )

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
        head_blocks = self.num_kv_heads // config.heads
        v_blocks = self.v_width // config.v_block
        yield Launch(
            latent_attention,
            (blocks * head_blocks * v_blocks, splits),
            {
                **self.constants,
                "q": q,
                "kv_cache": kv_cache,
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
                "stride_block": kv_cache.stride(0),
                "stride_slot": kv_cache.stride(1),
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
