"""KIVI (arXiv 2402.02750): keys rounded per channel, values per token, recent tokens not at all.

Algorithm 1: of ``n`` tokens, the keys of the last ``n mod R`` and the values of the last ``R`` are
exact; ``G`` neighbors share a float16 scale and zero point. Section 4: ``G`` is 32, ``R`` is 128.
"""

from __future__ import annotations

import torch

from recalkv_vllm.checkpoint import AttentionGeometry

from .peer import Peer, Window
from .uniform import affine, affine_bytes, channel_groups

GROUP = 32


class Kivi(Peer):
    """KIVI.

    Args:
        geometry: of the model.
        bits: of a code.
        residual: ``R``, a multiple of 32.
    """

    def __init__(self, geometry: AttentionGeometry, bits: int, residual: int = 128):
        super().__init__(geometry)
        self.bits = bits
        self.group = min(GROUP, geometry.head_dim)
        self.key_window = Window(step=residual)
        self.value_window = Window(recent=residual)

    def keys(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        whole = keys.shape[1] // GROUP * GROUP
        groups = keys[:, :whole].unflatten(1, (-1, GROUP)).mT
        rounded = affine(groups, self.bits).mT.flatten(1, 2)
        return torch.cat((rounded, keys[:, whole:]), dim=1)

    def values(self, layer: int, values: torch.Tensor) -> torch.Tensor:
        return affine(channel_groups(values, self.group), self.bits).flatten(-2)

    def head_bytes(self, layer: int) -> tuple[float, float]:
        size = self.geometry.head_dim
        return affine_bytes(size, self.bits, GROUP), affine_bytes(size, self.bits, self.group)
