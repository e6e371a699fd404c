"""What may change from call to call, checked on every one of them.

Conditions come before the helpers that name them: a call of a helper would cost more than the test.
"""

from __future__ import annotations

import torch

from recalkv_vllm.band_format import CacheFormat
from recalkv_vllm.key_scales import latent_width
from recalkv_vllm.ops.contract import Batch, Pieces
from recalkv_vllm.ops.validation.layer import LayerSignature
from recalkv_vllm.ops.validation.require import (
    DTYPES,
    MULTIPLE,
    require,
    require_device,
    require_dtype,
    require_shape,
)


def check_update(
    layer: LayerSignature,
    z: torch.Tensor,
    kv_cache: torch.Tensor,
    rank: int,
    slot_mapping: torch.Tensor,
) -> None:
    """Check the arguments of ``update_cache`` but for :func:`check_cache`, which found ``rank``,
    and :func:`check_slots`; raises as they do."""
    require_shape(z, "z", "tokens", rank)
    if layer.latent_format is not None:
        require_dtype(z, "z", *DTYPES)
    elif z.dtype != kv_cache.dtype:
        require_dtype(z, "z", kv_cache.dtype)
    if z.stride(1) != 1:
        require(False, "z", "a contiguous last dimension", f"strides {z.stride()}")
    if slot_mapping.shape[0] > z.shape[0]:
        require(False, "slot_mapping", f"at most {z.shape[0]} slots, as z", slot_mapping.shape[0])
    if z.device != layer.device:
        require_device(z, "z", layer.device)
    if layer.check_values and slot_mapping.numel():
        slots = kv_cache.shape[0] * kv_cache.shape[1]
        highest = int(slot_mapping.max())
        require(highest < slots, "slot_mapping", f"slots below {slots}", highest)


def check_slots(slot_mapping: torch.Tensor, device: torch.device) -> None:
    """Check slots of latents for layers on a device; raises as :func:`check_layer` does."""
    require_shape(slot_mapping, "slot_mapping", "tokens")
    require_dtype(slot_mapping, "slot_mapping", torch.int64, torch.int32)
    if slot_mapping.stride(0) != 1 and slot_mapping.shape[0] > 1:
        require(False, "slot_mapping", "contiguous", f"strides {slot_mapping.stride()}")
    require_device(slot_mapping, "slot_mapping", device)


def check_attend(
    layer: LayerSignature, q: torch.Tensor, kv_cache: torch.Tensor, batch: Batch
) -> None:
    """Check the arguments of ``attend`` but for :func:`check_cache` and :func:`check_batch`; raises
    as they do."""
    require_shape(q, "q", "tokens", "h_q", layer.head_dim)
    if q.dtype != layer.dtype:
        require_dtype(q, "q", layer.dtype)
    if q.shape[1] == 0 or q.shape[1] % layer.num_kv_heads:
        require(False, "q", f"a multiple of {layer.num_kv_heads} heads", q.shape[1])
    if layer.num_heads is not None and q.shape[1] != layer.num_heads:
        require(False, "q", f"{layer.num_heads} heads, as sinks", q.shape[1])
    if q.shape[0] and (q.stride(2) != 1 or q.stride(1) != layer.head_dim):
        require(False, "q", "the heads of a token contiguous", f"strides {q.stride()}")
    if layer.latent_format is None and kv_cache.dtype != layer.dtype:
        require_dtype(kv_cache, "kv_cache", layer.dtype)
    if q.device != layer.device:
        require_device(q, "q", layer.device)
    if layer.check_values:
        _check_values(batch, q.shape[0], kv_cache, layer.max_position)


def check_batch(batch: Batch, device: torch.device) -> None:
    """Check a batch for layers on a device; raises as :func:`check_layer` does."""
    require_shape(batch.block_table, "block_table", "num_seqs", "max_blocks")
    num_seqs = batch.block_table.shape[0]
    require_shape(batch.seq_lens, "seq_lens", num_seqs)
    require_shape(batch.query_start_loc, "query_start_loc", num_seqs + 1)
    for name, tensor in (
        ("block_table", batch.block_table),
        ("seq_lens", batch.seq_lens),
        ("query_start_loc", batch.query_start_loc),
    ):
        _check_indices(tensor, name, device)


def check_heads(q: torch.Tensor, out: torch.Tensor) -> None:
    """Check where ``attend_heads`` shall write; raises as :func:`check_layer` does."""
    if out.shape != q.shape:
        require(False, "out", f"q's shape {tuple(q.shape)}", tuple(out.shape))
    if out.dtype != q.dtype:
        require_dtype(out, "out", q.dtype)
    if out.device != q.device:
        require_device(out, "out", q.device)
    if out.shape[0] and out.stride(2) != 1:
        require(False, "out", "a contiguous last dimension", f"strides {out.stride()}")


def check_cache(layer: LayerSignature, kv_cache: torch.Tensor) -> int:
    """Check that a paged cache is one of the layer's latents; returns their rank.

    Raises as :func:`check_layer` does.
    """
    rank = _rank_of(kv_cache, layer.latent_format, layer.key_scales)
    if rank < layer.rank:
        require(False, "kv_cache", f"a rank of {layer.rank} or more, for spans", rank)
    require_device(kv_cache, "kv_cache", layer.device)
    return rank


def check_value_up(
    layer: LayerSignature, o_lat: torch.Tensor, out_dtype: torch.dtype | None
) -> None:
    """Check the arguments of ``value_up``; raises as :func:`check_layer` does."""
    require_shape(o_lat, "o_lat", "tokens", "h_q", layer.v_width)
    require_dtype(o_lat, "o_lat", *DTYPES)
    if o_lat.shape[1] == 0 or o_lat.shape[1] % layer.num_kv_heads:
        require(False, "o_lat", f"a multiple of {layer.num_kv_heads} heads", o_lat.shape[1])
    if o_lat.device != layer.device:
        require_device(o_lat, "o_lat", layer.device)
    if out_dtype is not None and out_dtype not in DTYPES:
        raise TypeError(f"out_dtype: expected one of {DTYPES}, found {out_dtype}")


def check_reconstruct(
    layer: LayerSignature,
    kv_cache: torch.Tensor,
    pieces: Pieces,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Check the arguments of ``reconstruct`` but for :func:`check_cache`; raises as it does."""
    if layer.latent_format is None:
        require_dtype(kv_cache, "kv_cache", layer.dtype)
    require_shape(pieces.block_table, "block_table", "num_seqs", "max_blocks")
    num_seqs = pieces.block_table.shape[0]
    require_shape(pieces.positions, "positions", num_seqs)
    require_shape(pieces.start_loc, "start_loc", num_seqs + 1)
    for name, tensor in (
        ("block_table", pieces.block_table),
        ("positions", pieces.positions),
        ("start_loc", pieces.start_loc),
    ):
        _check_indices(tensor, name, layer.device)
    for name, tensor in (("keys", keys), ("values", values)):
        require_shape(tensor, name, "tokens", layer.num_kv_heads, layer.head_dim)
        require_dtype(tensor, name, layer.dtype)
        require_device(tensor, name, layer.device)
        if not tensor.is_contiguous():
            require(False, name, "contiguous", f"strides {tensor.stride()}")
        if tensor.shape[0] < pieces.num_tokens:
            require(False, name, f"{pieces.num_tokens} rows, as pieces", tensor.shape[0])


def _rank_of(kv_cache: torch.Tensor, latent_format: CacheFormat | None, key_scales: int) -> int:
    """Check shape, dtype and strides of a paged cache of latents; returns their rank."""
    last = "rank" if latent_format is None else "slot_bytes"
    require_shape(kv_cache, "kv_cache", "num_blocks", "block_size", last)
    dtypes = DTYPES if latent_format is None else (torch.uint8,)
    if kv_cache.dtype not in dtypes:
        require_dtype(kv_cache, "kv_cache", *dtypes)
    _, block_size, slot = kv_cache.shape
    width = latent_width(slot, kv_cache.element_size(), key_scales) if key_scales else slot
    if block_size == 0 or block_size % MULTIPLE:
        require(False, "kv_cache", f"a block_size that is a multiple of {MULTIPLE}", block_size)
    if kv_cache.stride(2) != 1:
        require(False, "kv_cache", "a contiguous last dimension", f"strides {kv_cache.stride()}")
    if kv_cache.stride(1) != slot and (latent_format is not None or key_scales):
        require(False, "kv_cache", "contiguous blocks", f"strides {kv_cache.stride()}")
    if latent_format is None:
        if width <= 0 or width % MULTIPLE:
            expected = f"a rank that is a multiple of {MULTIPLE}"
            if key_scales:
                expected += f", and {key_scales} key scales"
            require(False, "kv_cache", expected, width)
        return width
    if kv_cache.stride(0) % MULTIPLE or kv_cache.storage_offset() % MULTIPLE:
        found = f"offset {kv_cache.storage_offset()} and strides {kv_cache.stride()}"
        require(False, "kv_cache", f"blocks at multiples of {MULTIPLE} bytes", found)
    try:
        return latent_format.rank_of(width)
    except ValueError as error:
        raise ValueError(f"kv_cache: {error}") from None


def _check_indices(tensor: torch.Tensor, name: str, device: torch.device) -> None:
    if tensor.dtype != torch.int32:
        require_dtype(tensor, name, torch.int32)
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        require(False, name, "a contiguous last dimension", f"strides {tensor.stride()}")
    if tensor.device != device:
        require_device(tensor, name, device)


def _check_values(
    batch: Batch, tokens: int, kv_cache: torch.Tensor, max_position: int | None
) -> None:
    num_blocks, block_size, _ = kv_cache.shape
    starts, lengths = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
    capacity = batch.block_table.shape[1] * block_size
    if max_position is not None:
        capacity = min(capacity, max_position)
    for i, length in enumerate(lengths):
        queries = starts[i + 1] - starts[i]
        require(
            0 <= starts[i] <= starts[i + 1] <= tokens,
            f"query_start_loc[{i + 1}]",
            f"{starts[i]} to {tokens} (rows of q)",
            starts[i + 1],
        )
        if queries == 0 or length == 0:
            continue
        require(
            queries <= length <= capacity,
            f"seq_lens[{i}]",
            f"{queries} (its queries) to {capacity} (slots in block_table, rows of cos_sin_cache)",
            length,
        )
        for j, block in enumerate(batch.block_table[i, : -(-length // block_size)].tolist()):
            require(
                0 <= block < num_blocks,
                f"block_table[{i}, {j}]",
                f"a block of kv_cache (0 to {num_blocks - 1})",
                block,
            )
