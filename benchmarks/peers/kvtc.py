"""Transform coding after KVTC (arXiv 2511.01815): principal components, bits where variance is.

Keys before RoPE and values, of all heads together, are centered and rotated to their principal
components on the calibration text; components get the bits of least total squared error, which for
these distortions a greedy choice finds as the paper's dynamic program does. The first 4 tokens and
the last 112 to 127 are exact (sections 3 and 4). Unlike the paper: components are those of one
layer, not of all layers together, scales are fixed by the calibration text, and codes are not
entropy-coded. The paper compresses caches that are stored; nothing decodes from them.
"""

from __future__ import annotations

import heapq

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.base_model.attention import CausalLM

from .lloyd_max import gaussian_distortion, gaussian_levels, nearest
from .peer import Peer, Window

MOST_BITS = 8


def allocate(variances: torch.Tensor, total: int) -> torch.Tensor:
    """Bits of least total squared error for normal variables: ``total`` of them, as int64.

    Args:
        variances: any shape, which the result has.
        total: bits.
    """
    flat = variances.flatten().tolist()
    bits = [0] * len(flat)
    gains = [gaussian_distortion(b) - gaussian_distortion(b + 1) for b in range(MOST_BITS)]
    heap = [(-variance * gains[0], i) for i, variance in enumerate(flat)]
    heapq.heapify(heap)
    for _ in range(min(total, MOST_BITS * len(flat))):
        _, i = heapq.heappop(heap)
        bits[i] += 1
        if bits[i] < MOST_BITS:
            heapq.heappush(heap, (-flat[i] * gains[bits[i]], i))
    return torch.tensor(bits).view(variances.shape)


class KvtcLike(Peer):
    """KVTC within a layer.

    Args:
        geometry: of the model.
        bits: of an element on average, of keys as of values.
    """

    calibrated = True
    key_window = value_window = Window(sink=4, recent=112, step=16)

    def __init__(self, geometry: AttentionGeometry, bits: int):
        super().__init__(geometry)
        self.bits = bits
        layers, width = geometry.num_layers, geometry.num_kv_heads * geometry.head_dim
        self.sums = torch.zeros(2, layers, width, dtype=torch.float64)
        self.moments = torch.zeros(2, layers, width, width, dtype=torch.float64)
        self.tokens = 0

    def attach(self, network: CausalLM) -> None:
        self.rotary = network.model.rotary_emb

    def _turn(self, keys: torch.Tensor, forward: bool) -> torch.Tensor:
        """RoPE of keys at positions 0, 1, ..., or its inverse."""
        cos, sin = self.rotary(keys, torch.arange(keys.shape[1], device=keys.device)[None])
        if not forward:
            squared = cos.square() + sin.square()  # of RoPE variants that scale
            cos, sin = cos / squared, -sin / squared
        return apply_rotary_pos_emb(keys[None], keys[None], cos, sin)[1][0]

    def observe(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        outputs: torch.Tensor,
    ) -> None:
        for part, x in enumerate((self._turn(keys, forward=False), values)):
            rows = x.transpose(0, 1).flatten(1).double().cpu()
            self.sums[part, layer] += rows.sum(0)
            self.moments[part, layer] += rows.T @ rows
        self.tokens += keys.shape[1] * (layer == 0)

    def fit(self) -> None:
        mean = self.sums / self.tokens
        covariance = self.moments / self.tokens - mean[..., :, None] * mean[..., None, :]
        variances, vectors = torch.linalg.eigh(covariance)
        variances = variances.clamp_min(0)
        total = self.bits * variances[0].numel()
        self.allocated = torch.stack([allocate(part, total) for part in variances])
        self.mean, self.deviation, self.vectors = (
            part.float() for part in (mean, variances.sqrt(), vectors)
        )

    def _round(self, part: int, layer: int, x: torch.Tensor) -> torch.Tensor:
        mean, deviation, vectors, allocated = (
            all_layers[part, layer].to(x.device)
            for all_layers in (self.mean, self.deviation, self.vectors, self.allocated)
        )
        rows = (x.transpose(0, 1).flatten(1) - mean) @ vectors
        rounded = torch.zeros_like(rows)
        for bits in allocated.unique().tolist():
            at = allocated == bits
            levels = gaussian_levels(bits)
            unit = rows[:, at] / deviation[at].clamp_min(torch.finfo(x.dtype).tiny)
            rounded[:, at] = nearest(unit, levels) * deviation[at]
        return (rounded @ vectors.T + mean).unflatten(1, (len(x), -1)).transpose(0, 1)

    def keys(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        return self._turn(self._round(0, layer, self._turn(keys, forward=False)), forward=True)

    def values(self, layer: int, values: torch.Tensor) -> torch.Tensor:
        return self._round(1, layer, values)

    def head_bytes(self, layer: int) -> tuple[float, float]:
        size = self.geometry.head_dim * self.bits / 8  # a mean over all layers
        return size, size
