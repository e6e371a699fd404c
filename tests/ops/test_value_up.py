from __future__ import annotations

import pytest
import torch

from recalkv_vllm.ops import bind, reference
from tests.ops.cases import value_layer
from tests.ops.checks import assert_within
from tests.ops.cpu_versions import DTYPES, VERSIONS
from tests.ops.rounding import allowed_value_up_error


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    "shape", [(1, 9, 3, 64, 96), (7, 8, 8, 80, 16), (33, 4, 1, 128, 48), (40, 4, 2, 112, 512)]
)
@pytest.mark.parametrize(("isa", "dtype"), VERSIONS, ids=str)
def test_matches_oracle(
    isa: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RECALKV_CPU_ISA", isa)
    tokens, heads, kv_heads, head_dim, width = shape
    o_lat = torch.randn(tokens, heads, width)
    v_up = (torch.randn(kv_heads, head_dim, width) / width**0.5).to(dtype)
    v_bias = torch.randn(kv_heads, head_dim).to(dtype) if bias else None
    oracle = reference.latent_value_up(
        o_lat, v_up, v_bias, out_dtype=torch.float64, compute_dtype=torch.float64
    )
    result = bind(value_layer(v_up, v_bias)).value_up(o_lat)
    assert result.dtype == dtype
    assert result.shape == (tokens, heads, head_dim)
    assert_within(result, oracle, allowed_value_up_error(o_lat, v_up, v_bias), "value up")


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("isa", "dtype"), VERSIONS, ids=str)
def test_out_dtype(
    isa: str, dtype: torch.dtype, out_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECALKV_CPU_ISA", isa)
    o_lat, v_up = torch.randn(3, 4, 16), torch.randn(2, 32, 16).to(dtype)
    o_lat[1, 2] = torch.nan
    bound = bind(value_layer(v_up))
    out = bound.value_up(o_lat, out_dtype)
    assert out.dtype == out_dtype
    assert torch.equal(out.isnan().all(-1), o_lat.isnan().all(-1))
    wide = bound.value_up(o_lat, torch.float32)
    torch.testing.assert_close(out, wide.to(out_dtype), rtol=0, atol=0, equal_nan=True)


def test_no_tokens() -> None:
    bound = bind(value_layer(torch.randn(2, 32, 16)))
    assert bound.value_up(torch.randn(0, 4, 16)).shape == (0, 4, 32)
