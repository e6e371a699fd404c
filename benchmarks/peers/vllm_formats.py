"""vLLM's own options of ``--kv-cache-dtype``, by the layouts and formulas of vLLM 0.32.

``fp8`` (e4m3; a scale per tensor, which is 1 unless the checkpoint brings one) and
``int8_per_token_head``, ``int4_per_token_head`` (a float32 scale for each head of a token).
"""

from __future__ import annotations

import torch

from recalkv_vllm.checkpoint import AttentionGeometry

from .hadamard import hadamard
from .peer import Peer

#: Bytes of a float32 scale, and the least scale.
SCALE = 4
LEAST = 1e-6


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """As e4m3 stores it; what is out of range becomes the largest number."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    return x.clamp(-largest, largest).to(torch.float8_e4m3fn).float()


class Fp8(Peer):
    """``fp8`` with the scale 1."""

    def keys(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        return e4m3(keys)

    def values(self, layer: int, values: torch.Tensor) -> torch.Tensor:
        return e4m3(values)

    def head_bytes(self, layer: int) -> tuple[float, float]:
        return self.geometry.head_dim, self.geometry.head_dim


class Int8PerTokenHead(Peer):
    """``int8_per_token_head``: symmetric."""

    def keys(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        scale = (keys.abs().amax(-1, keepdim=True) / 127).clamp_min(LEAST)
        return (keys / scale).round() * scale

    values = keys

    def head_bytes(self, layer: int) -> tuple[float, float]:
        size = self.geometry.head_dim + SCALE
        return size, size


class Int4PerTokenHead(Peer):
    """``int4_per_token_head``: signs drawn once, Hadamard, 16 levels around an integer zero point
    that is kept in the last bits of the scale."""

    def __init__(self, geometry: AttentionGeometry):
        super().__init__(geometry)
        size = geometry.head_dim
        generator = torch.Generator().manual_seed(0)
        signs = 2.0 * torch.randint(2, (size, 1), generator=generator) - 1
        block = size & -size  # the largest power of two that divides it
        blocks = torch.block_diag(*[hadamard(block)] * (size // block))
        self.rotation = signs * blocks

    def keys(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        x = keys @ self.rotation.to(keys)
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp_min(LEAST)
        zero = (-low / scale).round().clamp(0, 15)
        codes = (x / scale + zero).round().clamp(0, 15)
        return (codes - zero) * scale @ self.rotation.to(keys).T

    values = keys

    def head_bytes(self, layer: int) -> tuple[float, float]:
        size = self.geometry.head_dim / 2 + SCALE
        return size, size
