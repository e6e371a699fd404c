"""What a method may spend, and what it decides for all layers of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from recalkv_vllm.checkpoint import LatentLayout
from recalkv_vllm.latent_format import LatentFormat


@dataclass(frozen=True, slots=True)
class Budget:
    """One way to spend the bytes of the compressed cache.

    Args:
        compression: fraction of cached elements to remove; 0 is full rank.
        latent_format: how latents are stored; None for the factors' own dtype.
        latent_error: relative error of latents that are stored so.
    """

    compression: float
    latent_format: LatentFormat | None = None
    latent_error: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """What to factor every layer into.

    Args:
        layouts: of all layers; of one group size and one number of V groups.
        spans: their kind (:data:`recalkv_vllm.names.SPAN_KINDS`).
        latent_format: that the plan was made for.
        expected_loss: increase of the model's loss per token in nats; not a number for methods
            that do not know it.
    """

    layouts: tuple[LatentLayout, ...]
    spans: str
    latent_format: LatentFormat | None = None
    expected_loss: float = math.nan

    @property
    def k_group_size(self) -> int:
        """KV heads per K group."""
        return self.layouts[0].k_group_size

    @property
    def v_groups(self) -> int:
        """V groups per layer."""
        return len(self.layouts[0].v_spans)
