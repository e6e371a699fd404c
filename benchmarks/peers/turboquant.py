"""TurboQuant (arXiv 2504.19874): random rotation, then the best scalar quantizer.

Algorithm 1 (TurboQuant_mse) on the unit vector, whose rotated coordinates have a known density
(Lemma 1); the norm is a float16. Section 4.3: outlier channels are a second instance with a bit
more. Its text puts 32 of 128 channels at 3 bits and the others at 2 and calls that 2.5 bits,
though it is 2.25; a half is 2.5. Outliers are the channels of most energy on the calibration text.
"""

from __future__ import annotations

import torch

from recalkv_vllm.checkpoint import AttentionGeometry

from .hadamard import random_rotation
from .lloyd_max import nearest, sphere_levels
from .peer import HALF, Peer
from .uniform import half


class TurboQuant(Peer):
    """TurboQuant.

    Args:
        geometry: of the model.
        bits: of a channel that is no outlier; outliers have one more.
        outliers: share of channels.
    """

    calibrated = True

    def __init__(self, geometry: AttentionGeometry, bits: int, outliers: float):
        super().__init__(geometry)
        size = geometry.head_dim
        count = round(outliers * size)
        self.parts = ((count, bits + 1), (size - count, bits))
        generator = torch.Generator().manual_seed(0)
        self.rotations = [random_rotation(part, generator) for part, _ in self.parts]
        self.constant_bytes = sum(4 * 2**part_bits for _, part_bits in self.parts)
        shape = (2, geometry.num_layers, geometry.num_kv_heads, size)
        self.energy = torch.zeros(shape)
        self.order = torch.arange(size).expand(shape)

    def observe(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        outputs: torch.Tensor,
    ) -> None:
        for energy, x in zip(self.energy, (keys, values), strict=True):
            energy[layer] += x.square().sum(1).cpu()

    def fit(self) -> None:
        self.order = self.energy.argsort(dim=-1, descending=True)

    def _round(self, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        at = order.to(x.device)[:, None].expand(x.shape)
        rounded = []
        sizes = [size for size, _ in self.parts]
        for part, rotation, (size, bits) in zip(
            x.gather(-1, at).split(sizes, dim=-1), self.rotations, self.parts, strict=True
        ):
            norm = part.norm(dim=-1, keepdim=True)
            unit = part / norm.clamp_min(torch.finfo(x.dtype).tiny)
            levels = nearest(unit @ rotation.to(x), sphere_levels(size, bits))
            rounded.append(half(norm) * (levels @ rotation.to(x).T))
        return torch.empty_like(x).scatter(-1, at, torch.cat(rounded, dim=-1))

    def keys(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        return self._round(keys, self.order[0, layer])

    def values(self, layer: int, values: torch.Tensor) -> torch.Tensor:
        return self._round(values, self.order[1, layer])

    def head_bytes(self, layer: int) -> tuple[float, float]:
        size = sum(size * bits / 8 + HALF for size, bits in self.parts)
        return size, size
