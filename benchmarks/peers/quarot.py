"""QuaRot's cache (arXiv 2404.00456): heads rotated by a Hadamard matrix, then asymmetric groups.

Section 4.2: keys after RoPE, and queries with them, and values are rotated head by head. Section 5:
groups of 128 elements, at most a head, and a constant clipping ratio of 0.95.
"""

from __future__ import annotations

import torch

from recalkv_vllm.checkpoint import AttentionGeometry

from .hadamard import hadamard
from .peer import Peer
from .uniform import affine, affine_bytes, channel_groups

GROUP = 128
CLIP = 0.95


class QuaRot(Peer):
    """QuaRot's cache.

    Args:
        geometry: of the model.
        bits: of a code.
    """

    def __init__(self, geometry: AttentionGeometry, bits: int):
        super().__init__(geometry)
        self.bits = bits
        self.group = min(GROUP, geometry.head_dim)
        self.rotation = hadamard(geometry.head_dim)

    def keys(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        rotation = self.rotation.to(keys)
        groups = channel_groups(keys @ rotation, self.group)
        return affine(groups, self.bits, CLIP).flatten(-2) @ rotation.T

    values = keys

    def head_bytes(self, layer: int) -> tuple[float, float]:
        size = affine_bytes(self.geometry.head_dim, self.bits, self.group)
        return size, size
