"""vLLM's ``--kv-cache-dtype turboquant_*``, by the layouts and formulas of vLLM 0.32.

Keys: Hadamard, levels of a normal density, a float16 norm; with 8 bits, e4m3 as they are. Values:
equal steps between least and greatest, two float16. The first and the last two layers are dense.
"""

from __future__ import annotations

import math

import torch

from recalkv_vllm.checkpoint import AttentionGeometry

from .hadamard import hadamard
from .lloyd_max import gaussian_levels, nearest
from .peer import HALF, Peer
from .uniform import affine, half
from .vllm_formats import e4m3

#: Bits of keys and of values, and whether levels are made unit vectors again ("nc").
PRESETS = {
    "turboquant_k8v4": (8, 4, False),
    "turboquant_4bit_nc": (4, 4, True),
    "turboquant_k3v4_nc": (3, 4, True),
    "turboquant_3bit_nc": (3, 3, True),
}
DENSE_LAYERS = 2


class VllmTurboQuant(Peer):
    """A preset of vLLM.

    Args:
        geometry: of the model.
        preset: a name of :data:`PRESETS`.
    """

    def __init__(self, geometry: AttentionGeometry, preset: str):
        super().__init__(geometry)
        self.key_bits, self.value_bits, self.norm_correction = PRESETS[preset]
        ends = min(DENSE_LAYERS, geometry.num_layers // 2)
        self.rounded = range(ends, geometry.num_layers - ends)
        self.rotation = hadamard(geometry.head_dim)
        self.constant_bytes = 0 if self.key_bits == 8 else 4 * 2**self.key_bits

    def keys(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        if layer not in self.rounded:
            return keys
        if self.key_bits == 8:
            return e4m3(keys)
        rotation = self.rotation.to(keys)
        norm = keys.norm(dim=-1, keepdim=True)
        levels = gaussian_levels(self.key_bits) / math.sqrt(self.geometry.head_dim)
        unit = nearest(keys / (norm + 1e-8) @ rotation, levels)
        if self.norm_correction:
            unit = unit / unit.norm(dim=-1, keepdim=True)
        return half(norm) * (unit @ rotation.T)

    def values(self, layer: int, values: torch.Tensor) -> torch.Tensor:
        return affine(values, self.value_bits) if layer in self.rounded else values

    def head_bytes(self, layer: int) -> tuple[float, float]:
        size = self.geometry.head_dim
        if layer not in self.rounded:
            return HALF * size, HALF * size
        keys = size if self.key_bits == 8 else math.ceil(size * self.key_bits / 8) + HALF
        values = math.ceil(size * self.value_bits / 8) + 2 * HALF
        spare = (keys + values) % 2  # a slot is a whole number of pairs of bytes
        return keys, values + spare
