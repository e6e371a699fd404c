"""What storing latents costs, measured on the quantizer itself."""

from __future__ import annotations

from functools import cache

import torch

from recalkv_vllm.band_format import BandFormat, CacheFormat

#: Normal numbers on which a format's error is measured, and how many of them are one latent.
NUMBERS = 1 << 20
RANK = 1 << 10


@cache
def rounding_error(latent_format: CacheFormat) -> float:
    """Mean squared error of normal numbers that are stored and read, relative to their size.

    Quantizing a rotated latent of ``r`` elements costs ``ε · (Σ_{i ≤ r} s_i)² / r``, in the unit
    of the squared singular values ``s²`` that truncation discards: with ``√S`` on both sides a
    latent has covariance ``S`` and its up factor the metric ``S``; after a random rotation each
    element has the variance and the weight ``Σ s / r``.
    """
    rank = latent_format.rank if isinstance(latent_format, BandFormat) else RANK
    z = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0)).view(-1, rank)
    return float((latent_format.round_trip(z) - z).square().mean())
