"""Cache update and value up-projection in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from recalkv_vllm.latent_format import BITS, LatentFormat
from recalkv_vllm.ops import reference
from recalkv_vllm.ops import triton as ops
from tests.ops.cases import AttentionCase, caching_layer, paged_cache, value_layer
from tests.ops.checks import assert_within
from tests.ops.key_scales import SCALE_CASES, check_key_scales
from tests.ops.rounding import allowed_value_up_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("layout", ["dense", "blocks", "tokens"])
@pytest.mark.parametrize(("rank", "dtype"), [(48, torch.float32), (1040, torch.bfloat16)])
def test_writes_its_slots_and_nothing_else(rank: int, dtype: torch.dtype, layout: str) -> None:
    case = AttentionCase("update", rank=rank, block_size=16, cache=layout)
    caches = [paged_cache(case, 6, dtype, DEVICE) for _ in range(2)]
    z = torch.randn(42, rank + 16).to(DEVICE, dtype)[:, :rank]  # two rows more than slots
    slots = torch.randperm(6 * 16, device=DEVICE)[:40]
    slots[::7] = -1
    ops.bind(caching_layer(device=DEVICE)).update_cache(z, caches[0], slots)
    reference.latent_cache_update(z, caches[1], slots)
    torch.testing.assert_close(caches[0], caches[1], rtol=0, atol=0, equal_nan=True)
    assert int((~caches[0].isnan()).all(-1).sum()) == int((slots >= 0).sum())


@pytest.mark.parametrize("group_size", [0, 16, 64])
@pytest.mark.parametrize("latent_dtype", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantizes_bit_for_bit(dtype: torch.dtype, latent_dtype: str, group_size: int) -> None:
    latent_format = LatentFormat(latent_dtype, group_size)
    case = AttentionCase(
        "update", rank=336, block_size=16, cache="blocks", latent_format=latent_format
    )
    caches = [paged_cache(case, 6, dtype, DEVICE) for _ in range(2)]
    z = torch.randn(42, 336 + 16).to(DEVICE, dtype)[:, :336]
    z[:10] *= 2.0 ** torch.arange(-15, 15, 3, device=DEVICE).unsqueeze(1)
    z[10:13, :100] = 0
    z[13:16, 100:] *= 1e-38  # scales that are not normal numbers
    z[16:24] = z[16:24].round()  # on the edges between codes
    slots = torch.randperm(6 * 16, device=DEVICE)[:40]
    slots[::7] = -1
    ops.bind(caching_layer(latent_format, DEVICE)).update_cache(z, caches[0], slots)
    reference.latent_cache_update(z, caches[1], slots, latent_format)
    assert torch.equal(*caches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SCALE_CASES, ids=str)
def test_key_scales_are_those_of_stored_latents(case: AttentionCase, dtype: torch.dtype) -> None:
    check_key_scales(ops.bind, case, dtype, DEVICE)


def test_no_slots() -> None:
    cache = torch.zeros(2, 16, 32, device=DEVICE)
    slots = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    layer = ops.bind(caching_layer(device=DEVICE))
    layer.update_cache(torch.ones(0, 32, device=DEVICE), cache, slots)
    assert not cache.any()


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    "shape", [(1, 9, 3, 64, 96), (7, 8, 8, 80, 16), (33, 4, 1, 128, 48), (2, 14, 2, 112, 176)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_up(dtype: torch.dtype, shape: tuple[int, ...], bias: bool) -> None:
    tokens, heads, kv_heads, head_dim, width = shape
    o_lat = torch.randn(tokens, heads, width, device=DEVICE)
    v_up = (torch.randn(kv_heads, head_dim, width, device=DEVICE) / width**0.5).to(dtype)
    v_bias = torch.randn(kv_heads, head_dim, device=DEVICE).to(dtype) if bias else None
    oracle = reference.latent_value_up(
        o_lat, v_up, v_bias, out_dtype=torch.float64, compute_dtype=torch.float64
    )
    result = ops.bind(value_layer(v_up, v_bias)).value_up(o_lat)
    assert result.dtype == dtype
    assert result.shape == (tokens, heads, head_dim)
    assert_within(result, oracle, allowed_value_up_error(o_lat, v_up, v_bias), "value up")


def test_value_up_of_a_view_into_another_dtype() -> None:
    wide = torch.full((5, 6, 80), torch.nan, device=DEVICE)
    wide[:, 1:5, 16:48] = torch.randn(5, 4, 32, device=DEVICE)
    v_up = torch.randn(2, 32, 64, dtype=torch.bfloat16, device=DEVICE)[..., :32]
    out = ops.bind(value_layer(v_up)).value_up(wide[:, 1:5, 16:48], torch.float32)
    expected = reference.latent_value_up(wide[:, 1:5, 16:48], v_up, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=5e-2)


def test_value_up_of_no_tokens() -> None:
    layer = ops.bind(value_layer(torch.randn(2, 32, 16, device=DEVICE)))
    empty = layer.value_up(torch.randn(0, 4, 16, device=DEVICE))
    assert empty.shape == (0, 4, 32)
