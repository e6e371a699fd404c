"""Argument checks of the ops: one clear line before any kernel starts.

Constants are checked once, when an attention is bound; a call checks only what may change. With
``RECALKV_DEBUG=1`` calls also check the values of index tensors, which on a GPU waits for it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recalkv_vllm.latent_format import LatentFormat
from recalkv_vllm.ops.layer import LatentLayer

Span = tuple[int, int]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Spans, ranks and blocks of the paged cache come in multiples of this.
MULTIPLE = 16


def debug_enabled() -> bool:
    """Whether ``RECALKV_DEBUG=1`` asks for checks of values."""
    return os.environ.get("RECALKV_DEBUG") == "1"


def _require(condition: bool, name: str, expected: object, found: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, found {found}")


def _require_dtype(tensor: torch.Tensor, name: str, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected dtype {names}, found {found}")


def _require_shape(tensor: torch.Tensor, name: str, *shape: int | str) -> None:
    """``shape`` has sizes, or names of sizes that are free."""
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected shape [{expected}], found {list(tensor.shape)}")


def _require_device(tensor: torch.Tensor, name: str, device: torch.device) -> None:
    _require(tensor.device == device, name, f"device {device}", tensor.device)


def _require_spans(spans: Sequence[Span], name: str, width: int) -> None:
    for i, (start, end) in enumerate(spans):
        _require(
            0 <= start < end and start % MULTIPLE == 0 and end % MULTIPLE == 0,
            f"{name}[{i}]",
            f"start and end at multiples of {MULTIPLE}, start before end",
            (start, end),
        )
        _require(end - start == width, f"{name}[{i}]", f"a span {width} wide", (start, end))


@dataclass(frozen=True, slots=True)
class AttentionSignature:
    """What a bound attention fixes about the arguments of its calls."""

    num_kv_heads: int
    head_dim: int
    rank: int
    dtype: torch.dtype
    device: torch.device
    max_position: int | None
    latent_format: LatentFormat | None

    @classmethod
    def of(cls, layer: LatentLayer) -> AttentionSignature:
        """Check the constants of ``paged_latent_attention``.

        Raises:
            TypeError: a tensor's dtype.
            ValueError: anything else; the message names argument, expected and found.
        """
        k_up, k_spans, v_spans, head_dim = layer.k_up, layer.k_spans, layer.v_spans, layer.head_dim
        _require_shape(k_up, "k_up", "G_k", "s·d", "width")
        _require_dtype(k_up, "k_up", *DTYPES)
        groups, group_rows, width = k_up.shape
        _require(
            head_dim > 0 and group_rows > 0 and group_rows % head_dim == 0,
            "k_up",
            f"a multiple of head_dim = {head_dim} rows per group",
            group_rows,
        )
        _require(len(k_spans) == groups, "k_spans", f"{groups} spans, as k_up", len(k_spans))
        _require_spans(k_spans, "k_spans", width)
        num_kv_heads = groups * group_rows // head_dim
        _require(
            len(v_spans) > 0 and num_kv_heads % len(v_spans) == 0,
            "v_spans",
            f"a number of spans that divides {num_kv_heads} KV heads",
            len(v_spans),
        )
        _require_spans(v_spans, "v_spans", v_spans[0][1] - v_spans[0][0])
        _require(math.isfinite(layer.scale), "scale", "a finite number", layer.scale)
        shapes: dict[str, tuple[int | str, ...]] = {
            "cos_sin_cache": ("max_position", "rot_dim"),
            "k_bias": (num_kv_heads, head_dim),
            "k_norm_weight": (head_dim,),
        }
        for name, shape in shapes.items():
            tensor = getattr(layer, name)
            if tensor is not None:
                _require_shape(tensor, name, *shape)
                _require_dtype(tensor, name, *DTYPES)
                _require_device(tensor, name, k_up.device)
        if layer.cos_sin_cache is not None:
            _require(
                0 < layer.rot_dim <= head_dim and layer.rot_dim % 2 == 0,
                "cos_sin_cache",
                f"an even rot_dim of at most head_dim = {head_dim}",
                layer.rot_dim,
            )
        _require(
            layer.k_norm_eps >= 0, "k_norm_eps", "a number that is not negative", layer.k_norm_eps
        )
        _require(
            layer.sliding_window is None or layer.sliding_window > 0,
            "sliding_window",
            "a positive number or None",
            layer.sliding_window,
        )
        _require(
            layer.soft_cap is None or 0 < layer.soft_cap < math.inf,
            "soft_cap",
            "a positive number or None",
            layer.soft_cap,
        )
        return cls(
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rank=max(end for _, end in (*k_spans, *v_spans)),
            dtype=k_up.dtype,
            device=k_up.device,
            max_position=None if layer.cos_sin_cache is None else layer.cos_sin_cache.shape[0],
            latent_format=layer.latent_format,
        )

    def check_call(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
    ) -> None:
        """Check the arguments of one call; raises as :meth:`of` does."""
        _require_shape(q, "q", "tokens", "h_q", self.head_dim)
        if q.dtype != self.dtype:
            _require_dtype(q, "q", self.dtype)
        if q.shape[1] == 0 or q.shape[1] % self.num_kv_heads:
            _require(False, "q", f"a multiple of {self.num_kv_heads} heads", q.shape[1])
        if q.shape[0] and (q.stride(2) != 1 or q.stride(1) != self.head_dim):
            _require(False, "q", "the heads of a token contiguous", f"strides {q.stride()}")
        rank = check_cache(kv_cache, self.latent_format)
        if self.latent_format is None and kv_cache.dtype != self.dtype:
            _require_dtype(kv_cache, "kv_cache", self.dtype)
        if rank < self.rank:
            _require(False, "kv_cache", f"a rank of {self.rank} or more, for spans", rank)
        _require_shape(block_table, "block_table", "num_seqs", "max_blocks")
        num_seqs = block_table.shape[0]
        _require_shape(seq_lens, "seq_lens", num_seqs)
        _require_shape(query_start_loc, "query_start_loc", num_seqs + 1)
        for name, tensor in (
            ("block_table", block_table),
            ("seq_lens", seq_lens),
            ("query_start_loc", query_start_loc),
        ):
            if tensor.dtype != torch.int32:
                _require_dtype(tensor, name, torch.int32)
            if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
                _require(False, name, "a contiguous last dimension", f"strides {tensor.stride()}")
            if tensor.device != self.device:
                _require_device(tensor, name, self.device)
        if q.device != self.device or kv_cache.device != self.device:
            _require_device(q, "q", self.device)
            _require_device(kv_cache, "kv_cache", self.device)
        if debug_enabled():
            self._check_values(q, kv_cache, block_table, seq_lens, query_start_loc)

    def _check_values(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
    ) -> None:
        num_blocks, block_size, _ = kv_cache.shape
        starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
        capacity = block_table.shape[1] * block_size
        if self.max_position is not None:
            capacity = min(capacity, self.max_position)
        for i, length in enumerate(lengths):
            queries = starts[i + 1] - starts[i]
            _require(
                0 <= starts[i] <= starts[i + 1] <= q.shape[0],
                f"query_start_loc[{i + 1}]",
                f"{starts[i]} to {q.shape[0]} (rows of q)",
                starts[i + 1],
            )
            if queries == 0 or length == 0:
                continue
            _require(
                queries <= length <= capacity,
                f"seq_lens[{i}]",
                f"{queries} (its queries) to {capacity} (slots in block_table, rows of "
                "cos_sin_cache)",
                length,
            )
            for j, block in enumerate(block_table[i, : -(-length // block_size)].tolist()):
                _require(
                    0 <= block < num_blocks,
                    f"block_table[{i}, {j}]",
                    f"a block of kv_cache (0 to {num_blocks - 1})",
                    block,
                )


def check_cache(kv_cache: torch.Tensor, latent_format: LatentFormat | None = None) -> int:
    """Check shape, dtype and strides of a paged cache of latents; returns their rank."""
    last = "rank" if latent_format is None else "slot_bytes"
    _require_shape(kv_cache, "kv_cache", "num_blocks", "block_size", last)
    dtypes = DTYPES if latent_format is None else (torch.uint8,)
    if kv_cache.dtype not in dtypes:
        _require_dtype(kv_cache, "kv_cache", *dtypes)
    _, block_size, width = kv_cache.shape
    if block_size == 0 or block_size % MULTIPLE:
        _require(False, "kv_cache", f"a block_size that is a multiple of {MULTIPLE}", block_size)
    if kv_cache.stride(2) != 1:
        _require(False, "kv_cache", "a contiguous last dimension", f"strides {kv_cache.stride()}")
    if latent_format is None:
        if width == 0 or width % MULTIPLE:
            _require(False, "kv_cache", f"a rank that is a multiple of {MULTIPLE}", width)
        return width
    if kv_cache.stride(1) != width:
        _require(False, "kv_cache", "contiguous blocks", f"strides {kv_cache.stride()}")
    if kv_cache.stride(0) % MULTIPLE or kv_cache.storage_offset() % MULTIPLE:
        found = f"offset {kv_cache.storage_offset()} and strides {kv_cache.stride()}"
        _require(False, "kv_cache", f"blocks at multiples of {MULTIPLE} bytes", found)
    try:
        return latent_format.rank_of(width)
    except ValueError as error:
        raise ValueError(f"kv_cache: {error}") from None


def check_cache_update(
    z: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    latent_format: LatentFormat | None = None,
) -> None:
    """Check the arguments of ``latent_cache_update``; raises as above."""
    rank = check_cache(kv_cache, latent_format)
    _require_shape(z, "z", "tokens", rank)
    if latent_format is not None:
        _require_dtype(z, "z", *DTYPES)
    elif z.dtype != kv_cache.dtype:
        _require_dtype(z, "z", kv_cache.dtype)
    if z.stride(1) != 1:
        _require(False, "z", "a contiguous last dimension", f"strides {z.stride()}")
    _require_shape(slot_mapping, "slot_mapping", "tokens")
    _require_dtype(slot_mapping, "slot_mapping", torch.int64, torch.int32)
    if slot_mapping.shape[0] > z.shape[0]:
        _require(False, "slot_mapping", f"at most {z.shape[0]} slots, as z", slot_mapping.shape[0])
    if slot_mapping.stride(0) != 1 and slot_mapping.shape[0] > 1:
        _require(False, "slot_mapping", "contiguous", f"strides {slot_mapping.stride()}")
    _require_device(z, "z", kv_cache.device)
    _require_device(slot_mapping, "slot_mapping", kv_cache.device)
    if debug_enabled() and slot_mapping.numel():
        slots = kv_cache.shape[0] * kv_cache.shape[1]
        highest = int(slot_mapping.max())
        _require(highest < slots, "slot_mapping", f"slots below {slots}", highest)


def check_value_up(
    o_lat: torch.Tensor,
    v_up: torch.Tensor,
    v_bias: torch.Tensor | None,
    out_dtype: torch.dtype | None,
) -> None:
    """Check the arguments of ``latent_value_up``; raises as above."""
    _require_shape(v_up, "v_up", "h_kv", "d", "v_width")
    _require_dtype(v_up, "v_up", *DTYPES)
    num_kv_heads, head_dim, width = v_up.shape
    if num_kv_heads == 0:
        _require(False, "v_up", "at least one KV head", num_kv_heads)
    for name, size in (("d", head_dim), ("v_width", width)):
        if size == 0 or size % MULTIPLE:
            _require(False, "v_up", f"{name} at a positive multiple of {MULTIPLE}", size)
    _require_shape(o_lat, "o_lat", "tokens", "h_q", width)
    _require_dtype(o_lat, "o_lat", *DTYPES)
    if o_lat.shape[1] == 0 or o_lat.shape[1] % num_kv_heads:
        _require(False, "o_lat", f"a multiple of {num_kv_heads} heads", o_lat.shape[1])
    _require_device(o_lat, "o_lat", v_up.device)
    if v_bias is not None:
        _require_shape(v_bias, "v_bias", num_kv_heads, head_dim)
        _require_dtype(v_bias, "v_bias", *DTYPES)
        _require_device(v_bias, "v_bias", v_up.device)
    if out_dtype is not None and out_dtype not in DTYPES:
        raise TypeError(f"out_dtype: expected one of {DTYPES}, found {out_dtype}")
