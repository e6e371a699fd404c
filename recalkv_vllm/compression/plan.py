"""What a method may spend, and what it decides for all layers of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from recalkv_vllm.band_format import CacheFormat, stored_format, token_bytes
from recalkv_vllm.checkpoint import LatentLayout
from recalkv_vllm.latent_format import SCALE_BYTES, LatentFormat


@dataclass(frozen=True, slots=True)
class Budget:
    """One way to spend the bytes of the compressed cache.

    Args:
        compression: fraction of cached elements to remove, or of bytes if latents are in bands; 0
            is full rank.
        latent_format: how all layers' latents are stored; None for the factors' own dtype, and for
            bands.
        latent_error: relative error of latents that are stored so.
    """

    compression: float
    latent_format: LatentFormat | None = None
    latent_error: float = 0.0

    @property
    def removed(self) -> float:
        """Fraction of a 16-bit cache's bytes that is removed."""
        if self.latent_format is None:
            return self.compression
        bits = self.latent_format.bits + 8 * SCALE_BYTES / self.latent_format.group_size
        return 1 - (1 - self.compression) * bits / 16


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """What to factor every layer into.

    Args:
        layouts: of all layers; of one group size and one number of V groups.
        spans: their kind (:data:`recalkv_vllm.names.SPAN_KINDS`).
        uniform_format: how all layers' latents are stored, of layouts without bands.
        expected_loss: increase of the model's loss per token in nats; not a number for methods
            that do not know it.
    """

    layouts: tuple[LatentLayout, ...]
    spans: str
    uniform_format: LatentFormat | None = None
    expected_loss: float = math.nan

    def latent_format(self, layer: int) -> CacheFormat | None:
        """How a layer's latents are stored; None: as plain elements."""
        return stored_format(self.layouts[layer].bands, self.uniform_format)

    def token_bytes(self, itemsize: int, key_scales: int = 0) -> int:
        """KV-cache bytes per token, with plain elements of ``itemsize`` bytes.

        Args:
            key_scales: of a token in one layer, besides the latent.
        """
        return sum(
            token_bytes(self.latent_format(layer), layout.rank, itemsize, key_scales)
            for layer, layout in enumerate(self.layouts)
        )

    @property
    def k_group_size(self) -> int:
        """KV heads per K group."""
        return self.layouts[0].k_group_size

    @property
    def v_groups(self) -> int:
        """V groups per layer."""
        return len(self.layouts[0].v_spans)
