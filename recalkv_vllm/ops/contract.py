"""What every implementation of the ops takes and gives: a layer, a batch, a bound layer.

Written down once more as code in :mod:`recalkv_vllm.ops.reference`. Nothing here imports an
implementation, the dispatcher or a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from recalkv_vllm.band_format import CacheFormat
from recalkv_vllm.span import Span


class KernelUnavailableError(RuntimeError):
    """No implementation, or not the forced one, can serve a layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentLayer:
    """What a layer fixes once its weights are loaded.

    Implementations pack the tensors when they bind a layer; later changes of them are not seen.

    Args:
        k_up: ``[G_k, s·d, k_width]`` up factors of the K groups; ``h_kv = G_k · s``.
        v_up: ``[h_kv, d, v_width]`` up factors of the values, in ``k_up``'s dtype.
        k_spans: columns of the latent that each K group reads; plain pairs will do.
        v_spans: the same, one per V group; KV head ``h`` is in V group ``h // (h_kv / G_v)``.
        head_dim: ``d``.
        scale: factor on ``q·k``.
        cos_sin_cache: ``[max_position, rot_dim]``, cosines then sines (vLLM's layout); the row is
            the position of a token in its sequence. None: keys are not rotated.
        is_neox: RoPE pairs are ``(i, i + rot_dim/2)`` if true, ``(2i, 2i + 1)`` if not.
        k_bias: ``[h_kv, d]``, added to keys before norm and RoPE.
        v_bias: ``[h_kv, d]``, added to head outputs: once, since probabilities sum to one before
            sinks take their part.
        k_norm_weight: of an RMS norm of keys before RoPE: ``[d]`` for one of every head,
            ``[h_kv, d]`` for one over all heads of a token.
        k_norm_eps: its epsilon.
        sliding_window: a query sees this many newest keys, itself included.
        soft_cap: logits become ``cap · tanh(logit / cap)``.
        sinks: ``[h_q]``, a logit per query head that joins the sum of a softmax and has no value.
        latent_format: how latents are quantized in the cache.
    """

    k_up: torch.Tensor
    v_up: torch.Tensor
    k_spans: tuple[Span, ...]
    v_spans: tuple[Span, ...]
    head_dim: int
    scale: float
    cos_sin_cache: torch.Tensor | None = None
    is_neox: bool = True
    k_bias: torch.Tensor | None = None
    v_bias: torch.Tensor | None = None
    k_norm_weight: torch.Tensor | None = None
    k_norm_eps: float = 1e-6
    sliding_window: int | None = None
    soft_cap: float | None = None
    sinks: torch.Tensor | None = None
    latent_format: CacheFormat | None = None

    def __post_init__(self) -> None:
        for name in ("k_spans", "v_spans"):
            spans = tuple(Span(*span) for span in getattr(self, name))
            object.__setattr__(self, name, spans)

    @property
    def k_group_size(self) -> int:
        """KV heads per K group (``s``)."""
        return self.k_up.shape[1] // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        return self.k_up.shape[0] * self.k_group_size

    @property
    def heads_per_v(self) -> int:
        """KV heads per V group."""
        return self.num_kv_heads // len(self.v_spans)

    @property
    def k_width(self) -> int:
        return self.k_up.shape[2]

    @property
    def v_width(self) -> int:
        return self.v_spans[0].width

    @property
    def head_k_spans(self) -> tuple[Span, ...]:
        """The K span of every KV head."""
        return tuple(self.k_spans[h // self.k_group_size] for h in range(self.num_kv_heads))

    @property
    def head_v_spans(self) -> tuple[Span, ...]:
        """The V span of every KV head."""
        return tuple(self.v_spans[h // self.heads_per_v] for h in range(self.num_kv_heads))

    @property
    def key_scales(self) -> int:
        """Inverse root mean squares of keys that are cached with a token's latent."""
        if self.k_norm_weight is None:
            return 0
        return self.num_kv_heads if self.k_norm_weight.dim() == 1 else 1

    @property
    def rot_dim(self) -> int:
        """Columns of a head that RoPE turns."""
        return 0 if self.cos_sin_cache is None else self.cos_sin_cache.shape[1]


@dataclass(frozen=True, slots=True)
class Batch:
    """The sequences of one call, the same for all layers that share a block table.

    The hints are what the host knows without asking the device; they only make calls faster.

    Args:
        block_table: ``[num_seqs, max_blocks]`` int32.
        seq_lens: ``[num_seqs]`` int32, cached tokens including this call's; 0 is padding.
        query_start_loc: ``[num_seqs + 1]`` int32; sequence ``i`` owns the rows
            ``query_start_loc[i]:query_start_loc[i + 1]`` of the queries, its newest tokens.
        num_decodes: hint: this many first sequences have few queries each and
        num_decode_tokens: hint: own exactly this many first rows of the queries,
        max_decode_query_len: hint: at most this many each.
        max_seq_len: hint: bound on ``seq_lens``; what the block table can hold if not given.
        work_lists: how kernels cut these sequences, kept from the first layer of a step for the
            others; empty at first. Only where the tensors keep their values as long as the batch
            is used, but for what a CUDA graph captures, which cuts again when it is replayed; no
            two graphs may be captured with one. If not given, every call cuts its own.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    num_decodes: int = 0
    num_decode_tokens: int = 0
    max_decode_query_len: int = 1
    max_seq_len: int | None = None
    work_lists: dict[Any, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]

    def first(self, count: int) -> Batch:
        """The first ``count`` sequences."""
        if count == self.num_seqs:
            return self
        return replace(
            self,
            block_table=self.block_table[:count],
            seq_lens=self.seq_lens[:count],
            query_start_loc=self.query_start_loc[: count + 1],
        )

    def longest(self, block_size: int) -> int:
        """Bound on ``seq_lens`` that the host knows."""
        return self.max_seq_len or self.block_table.shape[1] * block_size


@dataclass(frozen=True, slots=True)
class Pieces:
    """Stretches of cached sequences, at most one of each, one after another.

    Args:
        block_table: ``[num_seqs, max_blocks]`` int32.
        positions: ``[num_seqs]`` int32, of a piece's first token in its sequence.
        start_loc: ``[num_seqs + 1]`` int32; piece ``i`` owns the rows
            ``start_loc[i]:start_loc[i + 1]`` of keys and values.
        num_tokens: rows of all, as the host knows.
    """

    block_table: torch.Tensor
    positions: torch.Tensor
    start_loc: torch.Tensor
    num_tokens: int


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """The largest batches that a bound layer will be called with.

    Args:
        num_heads: query heads.
        num_seqs: decodes of one call.
        decode_query_len: queries of a decode.
        seq_len: tokens of a sequence.
        num_tokens: queries of a call.
    """

    num_heads: int
    num_seqs: int
    decode_query_len: int
    seq_len: int
    num_tokens: int


class BoundLayer(Protocol):
    """The ops of one layer, its constants packed."""

    def update_cache(
        self, z: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write latents, and the scales of keys that are normed, into their slots of the cache.

        Args:
            z: ``[tokens, rank]`` latents; rows past the slots are padding.
            kv_cache: ``[num_blocks, block_size, rank]``, any strides; written in place. With a
                ``latent_format``, uint8 ``[num_blocks, block_size, slot_bytes]``, each block
                contiguous and laid out as :mod:`recalkv_vllm.latent_format` or
                :mod:`recalkv_vllm.band_format` says. With ``key_scales``, each block is contiguous
                and its slots are wider, as :mod:`recalkv_vllm.key_scales` says.
            slot_mapping: ``[slots]`` integers, ``block · block_size + offset``; negative is
                padding.
        """

    def attend(
        self, q: torch.Tensor, kv_cache: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Causal attention of rotated queries over a paged cache of latents.

        Args:
            q: ``[tokens, h_q, d]``, already normed and rotated, in ``k_up``'s dtype.
            kv_cache: as :meth:`update_cache` writes it.

        Returns:
            ``o_lat: [tokens, h_q, v_width]``, per-head value latents, and ``lse: [tokens, h_q]``,
            the natural log-sum-exp of the logits, both float32 and without sinks. Rows past
            ``query_start_loc[-1]``, which a padded batch has, are zero in ``o_lat``, as what
            follows in the model may take a maximum over all rows, and minus infinity in ``lse``.
        """

    def value_up(self, o_lat: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """``o[h] = L_v[h] o_lat[h] + b_v[h]``: head outputs ``[tokens, h_q, d]``.

        Args:
            o_lat: ``[tokens, h_q, v_width]``.
            out_dtype: dtype of the result; that of ``v_up`` if not given.
        """

    def attend_heads(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: Batch,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """:meth:`value_up` of what :meth:`attend` gives: head outputs ``[tokens, h_q, d]``.

        A head with a sink is multiplied by ``sigmoid(lse - sink)``, the share of the softmax's sum
        that is left beside it. Where many queries share a tile, an implementation may reconstruct
        its values instead.

        Args:
            q: as for :meth:`attend`; the result has its dtype. Rows past ``query_start_loc[-1]``
                are finite.
            kv_cache: as :meth:`update_cache` writes it.
            out: where the result goes and what is returned, ``[tokens, h_q, d]`` of ``q``'s dtype;
                new if not given.
        """

    def prefers_dense(self, num_heads: int, queries: float) -> bool:
        """Whether attention of ``queries`` per sequence shall be on what :meth:`reconstruct` gives.

        Args:
            num_heads: query heads.
            queries: on average.
        """
        return False

    def reconstruct(
        self, kv_cache: torch.Tensor, pieces: Pieces, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Keys, rotated, and values of cached tokens, bias and norm included.

        Args:
            kv_cache: as :meth:`update_cache` writes it.
            keys: ``[tokens, h_kv, d]`` of ``k_up``'s dtype, contiguous; the first
                ``pieces.num_tokens`` rows are written.
            values: the same.

        Raises:
            NotImplementedError: this implementation attends to latents alone.
        """
        name = type(self).__name__
        raise NotImplementedError(f"{name} does not reconstruct")

    def reserve(self, limits: BatchLimits) -> None:
        """Allocate what calls within ``limits`` need, and settle which kernel serves them, before
        memory is profiled and graphs are captured."""

    def warm_up(self, kv_cache: torch.Tensor, limits: BatchLimits) -> int:
        """Compile and load every kernel that calls within ``limits`` reach, before they come.

        Args:
            kv_cache: the cache that calls will be given; it is not changed.

        Returns:
            Kernels launched for it; 0 where nothing is compiled when first called.
        """
        return 0


class Implementation(Protocol):
    """What a module of this package offers to the dispatcher."""

    @staticmethod
    def unsupported_reason(
        device: torch.device, dtype: torch.dtype, head_dim: int | None
    ) -> str | None:
        """Why it cannot run here, or None."""

    @staticmethod
    def describe(device: torch.device, dtype: torch.dtype) -> str:
        """The version that runs here, for the log."""

    @staticmethod
    def bind(layer: LatentLayer) -> BoundLayer:
        """Pack a layer's constants.

        Raises:
            KernelUnavailableError: it is forced and cannot serve this layer.
        """
