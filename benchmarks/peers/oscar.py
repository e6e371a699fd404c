"""OSCAR (arXiv 2605.17757): 2 bits in a basis that attention chooses, both ends exact.

Section 3: keys are rotated by the eigenvectors of the queries' second moment ``QᵀQ``, values by
those of ``VᵀSᵀSV`` for attention weights ``S``, that is of attention's outputs; both then by a
Hadamard matrix. A layer has one rotation of each. (The permutation that follows in the paper
divides channels among groups; here a group is a head.) Each token's head is clipped at a quantile
of its magnitudes and rounded to equal steps, scale and offset in float16. The values of quantiles
and windows are those of the authors' instructions for serving.
"""

from __future__ import annotations

import torch

from recalkv_vllm.checkpoint import AttentionGeometry

from .hadamard import hadamard
from .peer import Peer, Window
from .uniform import affine, affine_bytes

BITS = 2
#: Quantiles of magnitudes of keys and of values.
CLIP = (0.96, 0.92)


class Oscar(Peer):
    """OSCAR.

    Args:
        geometry: of the model.
        sink: exact tokens at the beginning.
        recent: exact tokens at the end.
    """

    calibrated = True

    def __init__(self, geometry: AttentionGeometry, sink: int = 64, recent: int = 256):
        super().__init__(geometry)
        self.key_window = self.value_window = Window(sink, recent)
        size = geometry.head_dim
        self.moments = torch.zeros(2, geometry.num_layers, size, size, dtype=torch.float64)
        self.rotations = torch.empty(0)

    def observe(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        outputs: torch.Tensor,
    ) -> None:
        for moments, x in zip(self.moments, (queries, outputs), strict=True):
            moments[layer] += (x.mT @ x).sum(0).cpu()

    def fit(self) -> None:
        vectors = torch.linalg.eigh(self.moments).eigenvectors.float()
        self.rotations = vectors @ hadamard(self.geometry.head_dim)

    def _round(self, x: torch.Tensor, rotation: torch.Tensor, quantile: float) -> torch.Tensor:
        rotation = rotation.to(x)
        rotated = x @ rotation
        at = int(quantile * x.shape[-1])
        limit = rotated.abs().sort(dim=-1).values[..., at : at + 1]
        return affine(rotated.clamp(-limit, limit), BITS) @ rotation.T

    def keys(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        return self._round(keys, self.rotations[0, layer], CLIP[0])

    def values(self, layer: int, values: torch.Tensor) -> torch.Tensor:
        return self._round(values, self.rotations[1, layer], CLIP[1])

    def head_bytes(self, layer: int) -> tuple[float, float]:
        size = affine_bytes(self.geometry.head_dim, BITS, self.geometry.head_dim)
        return size, size
