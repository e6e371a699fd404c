"""How latents are stored: chosen together with their ranks, for a budget of bytes.

At a given size of the cache, fewer bits per element leave room for more elements. Quantizing a
rotated latent of ``r`` elements costs, in the unit of the squared singular values ``s²`` that
truncation discards,

    ε · (Σ_{i ≤ r} s_i)² / r,

``ε`` being the format's error relative to what it stores: with ``√S`` on both sides a latent has
covariance ``S`` and its up factor the metric ``S``; after a random rotation each of the ``r``
elements has the variance and the weight ``Σ s / r``. ``auto`` takes the format whose truncation and
quantization together cost least. The budget of reconstruction stays that of 16-bit latents.
"""

from __future__ import annotations

from functools import cache

import torch

from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.plan import Budget
from recalkv_vllm.latent_format import SCALE_BYTES, LatentFormat
from recalkv_vllm.names import LATENT_DTYPES

#: Elements per scale.
GROUP_SIZE = 32
#: What ``auto`` chooses from; None is the dtype of the factors. Not fp8: int8 is as small and
#: twenty times more exact.
AUTOMATIC = (None, "int8", "int4", "int3")
#: Normal numbers on which a format's error is measured.
SAMPLE = (1024, 1024)


def candidates(
    name: str, chooses: bool, compression: float, geometry: AttentionGeometry
) -> list[LatentFormat | None]:
    """Formats that ``--latent-dtype`` names; of ``auto``'s, those that fill the budget of bytes.

    Args:
        name: one of :data:`recalkv_vllm.names.LATENT_DTYPES`; ``bf16`` stands for the dtype of
            the factors, whatever it is.
        chooses: the method knows what a format costs.
        compression: fraction of 16-bit bytes to remove.
        geometry: of the model.

    Raises:
        InputError: an unknown name, or ``auto`` for a method that cannot choose.
    """
    if name not in LATENT_DTYPES:
        raise InputError(f"--latent-dtype {name}: expected one of {', '.join(LATENT_DTYPES)}")
    if name == "auto" and not chooses:
        raise InputError("--latent-dtype auto: only method kfac can choose; name one")
    names = {"auto": AUTOMATIC, "bf16": (None,)}.get(name, (name,))
    formats = [None if dtype is None else LatentFormat(dtype, GROUP_SIZE) for dtype in names]
    if name != "auto":
        return formats
    # One that alone removes more than was asked for would leave bytes unused.
    return [
        latent_format
        for latent_format in formats
        if latent_format is None or rank_compression(compression, geometry, latent_format) > 0
    ]


def rank_compression(
    compression: float, geometry: AttentionGeometry, latent_format: LatentFormat | None
) -> float:
    """Fraction of cached elements to remove so that ``compression`` of 16-bit bytes is removed.

    Not below 0: a format may remove more than was asked for without any help.
    """
    if latent_format is None:
        return compression
    dense = geometry.dense_width * geometry.num_layers
    # A rank that ends inside a group pays for a scale that it uses only half: a byte.
    kept_bytes = (1 - compression) * 2 * dense - geometry.num_layers
    bits = latent_format.bits + 8 * SCALE_BYTES / latent_format.group_size
    return max(0.0, 1 - kept_bytes * 8 / bits / dense)


def budget_of(
    compression: float, geometry: AttentionGeometry, latent_format: LatentFormat | None
) -> Budget:
    """What a plan for latents of this format may spend."""
    return Budget(
        rank_compression(compression, geometry, latent_format),
        latent_format,
        rounding_error(latent_format),
    )


@cache
def rounding_error(latent_format: LatentFormat | None) -> float:
    """Mean squared error of normal numbers that are stored and read, relative to their size."""
    if latent_format is None:
        return 0.0
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(SAMPLE, generator=generator)
    return float((latent_format.round_trip(z) - z).square().mean())
