"""Prompts attended as dense keys and values, reconstructed one slice of the context at a time.

The context of a prompt's part is cut into slices that fit a workspace. Keys and values of a slice
are reconstructed once, vLLM's FlashAttention attends to them, and slices are merged by their
log-sum-exp, as vLLM does for chunked context of MLA.
"""

from __future__ import annotations

import torch

from recalkv_vllm.ops import CheckedLayer, LatentLayer
from recalkv_vllm.ops.sinks import shares_beside_sinks
from recalkv_vllm.ops.workspace import reserve_workspace
from recalkv_vllm.serving.attention.flash_attention import FlashAttention, Logits, Partial
from recalkv_vllm.serving.attention.prefills import ContextSlice, Prefills


class DensePrefill:
    """Attention of one layer's prompts.

    Args:
        ops: the bound layer.
        layer: its constants.
        flash: attention over dense keys.
        num_heads: query heads.
        capacity: tokens of a slice; twice those of a batch leave as much room for context.

    Attributes:
        sinks: the layer's, which are weights and may change.
    """

    def __init__(
        self,
        ops: CheckedLayer,
        layer: LatentLayer,
        flash: FlashAttention,
        num_heads: int,
        capacity: int,
    ):
        self._ops, self._flash = ops, flash
        self._num_heads, self._capacity = num_heads, capacity
        self._logits = Logits(layer.scale, layer.soft_cap, layer.sliding_window)
        self.sinks = layer.sinks
        self._row = (layer.num_kv_heads, layer.head_dim)
        self._dtype, self._device = layer.k_up.dtype, layer.k_up.device
        self._workspace(capacity)

    def slices(self, prefills: Prefills) -> list[ContextSlice] | None:
        """Slices of the context, newest first; None if the layer better attends to latents."""
        if not self._ops.prefers_dense(self._num_heads, prefills.mean_queries):
            return None
        return prefills.slices(self._capacity, self._logits.window)

    def attend(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        prefills: Prefills,
        slices: list[ContextSlice],
        out: torch.Tensor,
    ) -> None:
        """Write the head outputs of prompts: as :meth:`BoundLayer.attend_heads` does.

        Args:
            q: ``[tokens, h_q, d]``; rows past ``prefills`` are padding, and zero in ``out``.
            slices: what :meth:`slices` gave.
        """
        tokens = prefills.num_tokens
        result: Partial | None = None
        for part in slices:
            keys, values = self._workspace(part.pieces.num_tokens)
            self._ops.reconstruct(kv_cache, part.pieces, keys, values)
            partial = self._flash.over(
                q[:tokens],
                keys,
                values,
                (prefills.query_start_loc, part.pieces.start_loc),
                (prefills.longest, part.longest),
                self._logits,
                causal=result is None,
            )
            result = partial if result is None else self._flash.merged(result, partial)
        assert result is not None
        if self.sinks is None:
            out[:tokens] = result.heads
        else:
            shares = shares_beside_sinks(result.lse.T, self.sinks)
            torch.mul(result.heads, shares[..., None], out=out[:tokens])
        out[tokens:] = 0

    def profile(self, q: torch.Tensor) -> None:
        """Take the memory, besides the workspace, that the call for ``q`` would take at most."""
        kept = [(torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)) for _ in "abc"]
        del kept

    def _workspace(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[tokens, h_kv, d]``, held until another call on the device."""
        heads, head_dim = self._row
        half = tokens * heads * head_dim
        nbytes = 2 * half * self._dtype.itemsize
        both = reserve_workspace(self._device, nbytes)[:nbytes].view(self._dtype)
        shape = (tokens, heads, head_dim)
        return both[:half].view(shape), both[half:].view(shape)
