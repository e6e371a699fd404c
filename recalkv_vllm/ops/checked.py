"""A bound layer whose arguments are checked before any kernel starts.

``TypeError`` for a dtype, ``ValueError`` for everything else.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from recalkv_vllm.ops import validation
from recalkv_vllm.ops.contract import Batch, BatchLimits, BoundLayer, LatentLayer, Pieces
from recalkv_vllm.ops.dispatch import implementation
from recalkv_vllm.ops.overwrite import overwrite


class CheckedLayer(BoundLayer):
    """A layer bound by the implementation chosen for it; see :class:`BoundLayer`.

    Raises:
        TypeError: the dtype of one of the layer's tensors.
        ValueError: anything else about the layer; the message names expected and found.
        KernelUnavailableError: no implementation can serve it.
    """

    #: The batch and the slots that were checked last, and for which device: layers of a step share
    #: them.
    _batch: ClassVar[tuple[Batch, torch.device] | None] = None
    _slots: ClassVar[tuple[torch.Tensor, torch.device] | None] = None
    #: The layer's cache that was checked last, and its rank; and, with that cache, how latents of
    #: an update, and queries and where their heads go, lay in memory.
    _cache: tuple[torch.Tensor, int] | None = None
    _latents: tuple[object, ...] | None = None
    _queries: tuple[object, ...] | None = None

    def __init__(self, layer: LatentLayer):
        self._signature = validation.check_layer(layer)
        chosen = implementation(layer.k_up.device, layer.k_up.dtype, layer.head_dim)
        self._bind = chosen.bind
        self._bound = self._bind(layer)
        self._limits: BatchLimits | None = None

    def rebind(self, layer: LatentLayer, *, captured: bool) -> None:
        """Take the constants of a layer of the same layout, after its weights changed.

        Args:
            captured: graphs hold the old ones: the new ones take their place in memory.

        Raises:
            TypeError, ValueError, KernelUnavailableError: as the constructor does; ``ValueError``
                also for what captured graphs would not see, and nothing has changed then.
        """
        signature = validation.check_layer(layer)
        bound = self._bind(layer)
        if captured:
            overwrite(self._bound, bound)
        else:
            if self._limits is not None:
                bound.reserve(self._limits)
            self._bound = bound
        self._signature = signature
        self._cache = self._latents = self._queries = None

    def update_cache(
        self, z: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        rank = self._rank_of(kv_cache)
        known, device = CheckedLayer._slots, self._signature.device
        if known is None or known[0] is not slot_mapping or known[1] != device:
            validation.check_slots(slot_mapping, device)
            CheckedLayer._slots = slot_mapping, device
        latents = *_layout(z), slot_mapping.shape
        if latents != self._latents or self._signature.check_values:
            validation.check_update(self._signature, z, kv_cache, rank, slot_mapping)
            self._latents = latents
        self._bound.update_cache(z, kv_cache, slot_mapping)

    def attend(
        self, q: torch.Tensor, kv_cache: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._check(q, kv_cache, batch)
        return self._bound.attend(q, kv_cache, batch)

    def attend_heads(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: Batch,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self._check(q, kv_cache, batch, out)
        return self._bound.attend_heads(q, kv_cache, batch, out)

    def _check(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: Batch,
        out: torch.Tensor | None = None,
    ) -> None:
        self._rank_of(kv_cache)
        known, device = CheckedLayer._batch, self._signature.device
        if known is None or known[0] is not batch or known[1] != device:
            validation.check_batch(batch, device)
            CheckedLayer._batch = batch, device
        queries = *_layout(q), *(() if out is None else _layout(out))
        if queries != self._queries or self._signature.check_values:
            validation.check_attend(self._signature, q, kv_cache, batch)
            if out is not None:
                validation.check_heads(q, out)
            self._queries = queries

    def _rank_of(self, kv_cache: torch.Tensor) -> int:
        if self._cache is None or self._cache[0] is not kv_cache:
            self._latents = self._queries = None
            self._cache = kv_cache, validation.check_cache(self._signature, kv_cache)
        return self._cache[1]

    def value_up(self, o_lat: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        validation.check_value_up(self._signature, o_lat, out_dtype)
        return self._bound.value_up(o_lat, out_dtype)

    def prefers_dense(self, num_heads: int, queries: float) -> bool:
        return self._bound.prefers_dense(num_heads, queries)

    def reconstruct(
        self, kv_cache: torch.Tensor, pieces: Pieces, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        self._rank_of(kv_cache)
        validation.check_reconstruct(self._signature, kv_cache, pieces, keys, values)
        self._bound.reconstruct(kv_cache, pieces, keys, values)

    def reserve(self, limits: BatchLimits) -> None:
        self._bound.reserve(limits)
        self._limits = limits

    def warm_up(self, kv_cache: torch.Tensor, limits: BatchLimits) -> int:
        return self._bound.warm_up(kv_cache, limits)


def _layout(tensor: torch.Tensor) -> tuple[object, ...]:
    """All that is checked of a tensor, but for its values."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def bind(layer: LatentLayer) -> CheckedLayer:
    """Check a layer's constants and pack them for the implementation that serves it.

    Packing costs more than a call: bind once, when weights are loaded. Raises as
    :class:`CheckedLayer` does.
    """
    return CheckedLayer(layer)
