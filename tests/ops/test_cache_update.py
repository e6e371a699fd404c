from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recalkv_vllm.band_format import PLANES, BandFormat
from recalkv_vllm.latent_format import BITS, LatentFormat
from recalkv_vllm.ops import LatentLayer, bind, reference
from recalkv_vllm.ops.key_norm import key_scales
from recalkv_vllm.span import Span
from tests.ops.cases import AttentionCase, caching_layer, paged_cache
from tests.ops.key_scales import SCALE_CASES, check_key_scales

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("slot_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("layout", ["dense", "blocks", "tokens"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes_its_slots_and_nothing_else(
    dtype: torch.dtype, layout: str, slot_dtype: torch.dtype
) -> None:
    case = AttentionCase("update", rank=48, block_size=16, cache=layout)
    caches = [paged_cache(case, 40, dtype, "cpu") for _ in range(2)]
    tokens = 300
    z = torch.randn(tokens + 2, 48 + 16).to(dtype)[:, :48]
    slots = torch.randperm(40 * 16)[:tokens].to(slot_dtype)
    slots[::7] = -1
    bind(caching_layer()).update_cache(z, caches[0], slots)
    reference.latent_cache_update(z, caches[1], slots)
    torch.testing.assert_close(caches[0], caches[1], rtol=0, atol=0, equal_nan=True)
    assert int((~caches[0].isnan()).all(-1).sum()) == int((slots >= 0).sum())


@pytest.mark.parametrize("group_size", [0, 16, 64])
@pytest.mark.parametrize("latent_dtype", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantizes_bit_for_bit(dtype: torch.dtype, latent_dtype: str, group_size: int) -> None:
    latent_format = LatentFormat(latent_dtype, group_size)
    case = AttentionCase(
        "update", rank=336, block_size=16, cache="blocks", latent_format=latent_format
    )
    caches = [paged_cache(case, 40, dtype, "cpu") for _ in range(2)]
    z = torch.randn(302, 336 + 16).to(dtype)[:, :336]
    z[:40] *= 2.0 ** torch.arange(-28, 12).unsqueeze(1)
    z[40:50, :100] = 0
    z[50:60, 100:] *= torch.tensor(1e-38).to(dtype)  # scales that are not normal numbers
    z[60:70] = z[60:70].round()  # on the edges between codes
    slots = torch.randperm(40 * 16)[:300]
    slots[::7] = -1
    bind(caching_layer(latent_format)).update_cache(z, caches[0], slots)
    reference.latent_cache_update(z, caches[1], slots, latent_format)
    assert torch.equal(*caches)
    untouched = (caches[0] == 0xFF).all(dim=(1, 2))
    assert not untouched.all()
    parts = latent_format.split_cache(caches[0])
    codes, scales = (part.flatten(0, 1)[slots[slots >= 0]] for part in parts)
    back = latent_format.dequantize(latent_format.unpack(codes), scales)
    expected = latent_format.round_trip(z[:300][slots >= 0].float())
    torch.testing.assert_close(back, expected, rtol=0, atol=0)
    _, scales = latent_format.split_cache(caches[0])
    written = (~scales.isnan()).all(-1).flatten()
    assert int(written.sum()) == int((slots >= 0).sum())


@pytest.mark.parametrize(
    "bands",
    [
        *([(96, bits)] for bits in PLANES),
        [(32, 8), (64, 6), (32, 4), (96, 3), (32, 2)],
        [(32, 3), (32, 2), (32, 6)] * 3,
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes_bands_bit_for_bit(dtype: torch.dtype, bands: list[tuple[int, int]]) -> None:
    latent_format = BandFormat(tuple(bands))
    rank = latent_format.rank
    case = AttentionCase(
        "update", rank=rank, block_size=16, cache="blocks", latent_format=latent_format
    )
    caches = [paged_cache(case, 40, dtype, "cpu") for _ in range(2)]
    generator = torch.Generator().manual_seed(rank)
    z = torch.randn(302, rank + 16, generator=generator)[:, :rank]
    z[:250] *= 2.0 ** (torch.arange(250) % 150 - 30).unsqueeze(1)  # scales saturate at both ends
    z[250:260, ::2] = 0
    z[260:270] = 0
    z[270:275] = -0.0
    z[275:280] *= 1e-40  # not normal numbers
    z[280, 5::32] = torch.nan
    z[281, 5::32] = torch.inf
    z[282, 5::32] = -torch.inf
    z[283, 5::64] = torch.nan
    z[283, 6::64] = torch.inf
    z[284:294] = z[284:294].round()  # on the edges between codes
    z[294] = 61440  # the largest scale, and more than it
    z[295] = 61440 * 128
    z = z.to(dtype)
    slots = torch.randperm(40 * 16, generator=generator)[:300]
    slots[::7] = -1
    bind(caching_layer(latent_format)).update_cache(z, caches[0], slots)
    reference.latent_cache_update(z, caches[1], slots, latent_format)
    assert torch.equal(*caches)
    codes, _ = latent_format.split_cache(caches[0])
    written = torch.zeros(40 * 16, dtype=torch.bool)
    written[slots[slots >= 0]] = True
    used = sum(columns * bits // 8 for columns, bits in bands)
    assert not codes.flatten(0, 1)[written, used:].any()
    assert (codes.flatten(0, 1)[~written] == 0xFF).all()


def test_no_tokens() -> None:
    cache = torch.zeros(2, 16, 32)
    slots = torch.zeros(0, dtype=torch.int64)
    bind(caching_layer()).update_cache(torch.ones(0, 32), cache, slots)
    assert not cache.any()


def test_slot_outside_the_cache() -> None:
    cache = torch.zeros(2, 16, 32)
    with pytest.raises(ValueError, match=r"slot_mapping\[1\]: expected .*32.* found 32"):
        bind(caching_layer()).update_cache(torch.ones(2, 32), cache, torch.tensor([0, 32]))
    assert not cache.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SCALE_CASES, ids=str)
def test_key_scales_are_those_of_stored_latents(case: AttentionCase, dtype: torch.dtype) -> None:
    check_key_scales(bind, case, dtype)


@pytest.mark.parametrize("case", SCALE_CASES, ids=str)
def test_key_scales_of_the_reference(case: AttentionCase) -> None:
    check_key_scales(reference.bind, case, torch.float32)


def test_key_scales_are_of_keys_before_the_norms_weight() -> None:
    """Of one latent, from the definition."""
    up, bias = torch.tensor([[[3.0], [0.0], [1.0], [2.0]]]), torch.tensor([[1.0, 0], [0, 0]])
    layer = LatentLayer(
        k_up=up, v_up=up.view(2, 2, 1), k_spans=(Span(0, 1),), v_spans=(Span(0, 1),), head_dim=2,
        scale=1.0, k_bias=bias, k_norm_weight=torch.tensor([5.0, 7.0]), k_norm_eps=0.5,
    )  # fmt: skip
    found = key_scales(layer, torch.tensor([[1.0]]), torch.float32)
    torch.testing.assert_close(found, torch.tensor([[8.5, 3.0]]).rsqrt())
    of_all = replace(layer, k_norm_weight=torch.ones(2, 2))
    found = key_scales(of_all, torch.tensor([[1.0]]), torch.float32)
    torch.testing.assert_close(found, torch.tensor([[5.75]]).rsqrt())
