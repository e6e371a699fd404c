"""What every implementation's cached key scales must be, for tests of cache updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from recalkv_vllm.key_scales import split_pages
from recalkv_vllm.ops import LatentLayer, reference
from recalkv_vllm.ops.contract import BoundLayer
from recalkv_vllm.ops.key_norm import key_scales, stored_latents
from tests.ops.band_cases import BAND_CASES
from tests.ops.cases import AttentionCase, build, joint, quantized, spanned
from tests.ops.rounding import unit_roundoff

PER_HEAD = spanned("per-head", (6, 3, 80), 1, 48, 1, 64, overlap=16, key_norm=True)
OF_ALL = joint("of-all", (8, 4, 64), 2, 96, key_norm="all heads", key_bias=True, cache="blocks")
SCALE_CASES: tuple[AttentionCase, ...] = (
    PER_HEAD,
    replace(PER_HEAD, name="per-head-bias", key_bias=True, is_neox=False, cache="blocks"),
    OF_ALL,
    *quantized((PER_HEAD, OF_ALL), "int4", 32),
    replace(BAND_CASES[0], name="bands", key_norm=True),
)


def check_key_scales(
    bind: Callable[[LatentLayer], BoundLayer],
    case: AttentionCase,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> None:
    """Latents of all but padding's slots get the scales of what the cache gives back for them.

    A mean of ``d`` squares is off by less than the largest of its terms; the bound is that of one.
    """
    inputs = build(replace(case, batch=((1, 64),)), dtype, device)
    layer, cache = inputs.layer, inputs.kv_cache
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(40, case.rank, generator=generator).to(device, dtype)
    z[3] = 0
    slots = torch.randperm(cache.shape[0] * cache.shape[1], generator=generator)[:38].to(device)
    slots[::5] = -1
    before = cache.clone()
    bind(layer).update_cache(z, cache, slots)
    written = slots[slots >= 0]
    where = (written // cache.shape[1], written % cache.shape[1])
    latents, scales = split_pages(cache, layer.key_scales)
    unscaled, _ = split_pages(before, layer.key_scales)
    reference.latent_cache_update(z, unscaled, slots, layer.latent_format)
    torch.testing.assert_close(latents, unscaled, rtol=0, atol=0, equal_nan=True)
    assert scales is not None
    exact = key_scales(layer, stored_latents(latents, where, layer.latent_format), torch.float64)
    limit = 4 * unit_roundoff(dtype, case.k_spans[0].width)
    torch.testing.assert_close(scales[where].double(), exact, rtol=limit, atol=0)
    _, old = split_pages(before, layer.key_scales)
    assert old is not None
    old[where] = scales[where]
    torch.testing.assert_close(scales, old, rtol=0, atol=0, equal_nan=True)
