"""What every peer is: how it rounds keys and values, which tokens it does not round, its bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.base_model.attention import CausalLM

#: Bytes of an element, a scale or an offset in 16 bits.
HALF = 2


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens that a query reads as they are, of the ``n`` that are cached (its own included).

    The first ``sink`` ones, and the last ``recent``. Tokens leave the latter in steps: between
    ``recent`` and ``recent + step - 1`` of them are in it, and the older ones are whole steps.
    """

    sink: int = 0
    recent: int = 0
    step: int = 1

    @property
    def empty(self) -> bool:
        return self == Window()

    def exact(self, queries: torch.Tensor, tokens: int) -> torch.Tensor:
        """Which of ``tokens`` are exact for the queries at some positions: ``[queries, tokens]``
        bool."""
        start = (queries + 1 - self.recent).div(self.step, rounding_mode="floor") * self.step
        position = torch.arange(tokens, device=queries.device)
        return (position >= start[:, None]) | (position < self.sink)

    def share(self, context: int) -> float:
        """Share of a context's tokens that is exact, on average over the steps."""
        return min(1.0, (self.sink + self.recent + (self.step - 1) / 2) / context)


class Peer:
    """Rounds keys after RoPE and values as its cache does, on the way to attention.

    Args:
        geometry: of the model.
    """

    key_window = Window()
    value_window = Window()
    #: Whether it must see the calibration text before anything else.
    calibrated = False
    #: Bytes that a model's cache takes once: codebooks.
    constant_bytes = 0

    def __init__(self, geometry: AttentionGeometry):
        self.geometry = geometry

    def observe(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        outputs: torch.Tensor,
    ) -> None:
        """See a layer of the dense model on a sample of the calibration text.

        Args:
            layer: its index.
            queries: after RoPE, ``[h_q, tokens, d]``.
            keys: after RoPE, ``[h_kv, tokens, d]``.
            values: as ``keys``.
            outputs: of attention, as ``queries``.
        """

    def fit(self) -> None:
        """The calibration text is over."""

    def attach(self, network: CausalLM) -> None:
        """See the model whose cache it is, before all else."""

    def keys(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        """What the cache gives back of ``keys``, ``[h_kv, tokens, d]`` float32, after RoPE."""
        raise NotImplementedError

    def values(self, layer: int, values: torch.Tensor) -> torch.Tensor:
        """What the cache gives back of ``values``, as :meth:`keys`."""
        raise NotImplementedError

    def head_bytes(self, layer: int) -> tuple[float, float]:
        """Bytes of one KV head's rounded key and value of a token, scales and all."""
        raise NotImplementedError

    def bytes_per_token(self, context: int) -> float:
        """Bytes of a token over all layers, as a mean over a context of so many tokens.

        Exact tokens take 16 bits an element.
        """
        exact = HALF * self.geometry.head_dim
        total = 0.0
        for layer in range(self.geometry.num_layers):
            windows = (self.key_window, self.value_window)
            for rounded, window in zip(self.head_bytes(layer), windows, strict=True):
                share = window.share(context)
                total += share * exact + (1 - share) * rounded
        return total * self.geometry.num_kv_heads + self.constant_bytes / context
