"""Random batches of the C++ ops: legal ones match the reference, illegal ones raise by name."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recalkv_vllm import ops
from recalkv_vllm.band_format import BandFormat, CacheFormat
from recalkv_vllm.ops import reference
from tests.ops.cases import (
    AttentionCase,
    attend,
    build,
    caching_layer,
    paged_cache,
    value_layer,
)
from tests.ops.checks import assert_matches_oracle, assert_within
from tests.ops.cpu_versions import DTYPES, VERSIONS, poison_free_memory, threads
from tests.ops.rounding import allowed_heads_error, allowed_value_up_error
from tests.ops.strategies import attention_cases, band_formats, latent_formats
from tests.reliability.figures import count
from tests.reliability.fuzzing import fuzzed
from tests.reliability.illegal import (
    Call,
    illegal_attention,
    illegal_cache_update,
    illegal_value_up,
)

HEAD_DIMS = (16, 32, 64, 80, 128)
CASES = attention_cases(HEAD_DIMS)
FORMATS = st.none() | latent_formats() | band_formats()
SEEDS = st.integers(0, 2**31)


@fuzzed(80)
@given(case=CASES, version=st.sampled_from(VERSIONS), workers=st.integers(1, 3))
def test_attention(case: AttentionCase, version: tuple[str, torch.dtype], workers: int) -> None:
    isa, dtype = version
    inputs = build(case, dtype)
    with threads(workers), mock.patch.dict(os.environ, RECALKV_CPU_ISA=isa):
        poison_free_memory(case)
        assert_matches_oracle(attend(inputs), case, dtype)
    count("batches tried")


@fuzzed(60)
@given(case=CASES, version=st.sampled_from(VERSIONS), workers=st.integers(1, 3))
def test_heads(case: AttentionCase, version: tuple[str, torch.dtype], workers: int) -> None:
    isa, dtype = version
    inputs = build(case, dtype)
    with threads(workers), mock.patch.dict(os.environ, RECALKV_CPU_ISA=isa):
        poison_free_memory(case)
        heads = ops.bind(inputs.layer).attend_heads(*inputs.call)
    rows = sum(queries for queries, _ in case.batch)
    exact = reference.paged_latent_heads(inputs.layer, *inputs.call, compute_dtype=torch.float64)
    allowed = allowed_heads_error(inputs, dtype)
    assert_within(heads[:rows], exact[:rows], allowed[:rows], "heads")
    assert heads[rows:].eq(0).all()
    count("batches tried")


@st.composite
def updates(
    draw: st.DrawFn, latent_format: CacheFormat | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``z``, an all-NaN cache, and slots that name each at most once, some of them padding."""
    dtype = draw(st.sampled_from(DTYPES))
    layouts = ("dense", "blocks") if latent_format else ("dense", "blocks", "tokens")
    rank = 16 * draw(st.integers(1, 12))
    if isinstance(latent_format, BandFormat):
        rank = latent_format.rank
    case = AttentionCase(
        "update",
        rank=rank,
        block_size=16 * draw(st.integers(1, 4)),
        cache=draw(st.sampled_from(layouts)),
        latent_format=latent_format,
    )
    blocks = draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    tokens = draw(st.integers(0, min(70, blocks * case.block_size)))
    slots = torch.randperm(blocks * case.block_size, generator=generator)[:tokens]
    slots[torch.rand(tokens, generator=generator) < draw(st.sampled_from((0, 0.3, 1)))] = -1
    padded = tokens + draw(st.sampled_from((0, 3)))
    z = torch.randn(padded, case.rank + 16, generator=generator)
    z *= 2.0 ** torch.randint(-20, 12, (padded, 1), generator=generator)
    z[tokens:] = torch.nan
    slots = slots.to(draw(st.sampled_from((torch.int64, torch.int32))))
    return z.to(dtype)[:, : case.rank], paged_cache(case, blocks, dtype, "cpu"), slots


@fuzzed(80)
@given(data=st.data(), latent_format=FORMATS, workers=st.integers(1, 3))
def test_cache_update(data: st.DataObject, latent_format: CacheFormat | None, workers: int) -> None:
    """The same bits as the reference's, those of all slots that were not named included."""
    z, cache, slots = data.draw(updates(latent_format))
    expected = cache.clone()
    reference.latent_cache_update(z, expected, slots, latent_format)
    with threads(workers):
        ops.bind(caching_layer(latent_format)).update_cache(z, cache, slots)
    torch.testing.assert_close(cache, expected, rtol=0, atol=0, equal_nan=True)
    count("batches tried")


@fuzzed(60)
@given(
    data=st.data(),
    version=st.sampled_from(VERSIONS),
    out_dtype=st.none() | st.sampled_from(DTYPES),
    workers=st.integers(1, 3),
)
def test_value_up(
    data: st.DataObject,
    version: tuple[str, torch.dtype],
    out_dtype: torch.dtype | None,
    workers: int,
) -> None:
    isa, dtype = version
    kv_heads, per_kv = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 8))
    head_dim, width = (16 * data.draw(st.integers(1, 9)) for _ in range(2))
    tokens = data.draw(st.integers(0, 40))
    generator = torch.Generator().manual_seed(data.draw(SEEDS))
    o_lat = torch.randn(tokens, kv_heads * per_kv, width, generator=generator)
    v_up = torch.randn(kv_heads, head_dim, width, generator=generator).to(dtype) / width**0.5
    bias = torch.randn(kv_heads, head_dim, generator=generator).to(dtype)
    v_bias = bias if data.draw(st.booleans()) else None
    with threads(workers), mock.patch.dict(os.environ, RECALKV_CPU_ISA=isa):
        torch.full(
            (tokens * kv_heads * per_kv * head_dim,), torch.nan
        )  # freed, and handed out next
        result = ops.bind(value_layer(v_up, v_bias)).value_up(o_lat, out_dtype)
    wide = torch.float64
    oracle = reference.latent_value_up(o_lat, v_up, v_bias, out_dtype=wide, compute_dtype=wide)
    count("batches tried")
    assert result.dtype == (out_dtype or dtype)
    assert result.shape == oracle.shape
    allowed = allowed_value_up_error(o_lat, v_up, v_bias, out_dtype)
    assert_within(result, oracle, allowed, "value up")


def assert_refused(call: Call) -> None:
    """The call raises, names the argument, and has not written anything."""
    before = [tensor.clone() for tensor in call.written]
    with pytest.raises((TypeError, ValueError)) as caught:
        call.run()
    message = str(caught.value).splitlines()[0]
    assert message.startswith(call.names), f"expected {call.names} named first, found: {message}"
    for tensor, content in zip(call.written, before, strict=True):
        torch.testing.assert_close(tensor, content, rtol=0, atol=0, equal_nan=True)
    count("illegal calls refused")


@fuzzed(250)
@given(case=CASES, dtype=st.sampled_from(DTYPES), data=st.data())
def test_illegal_attention(case: AttentionCase, dtype: torch.dtype, data: st.DataObject) -> None:
    assert_refused(data.draw(illegal_attention(build(case, dtype))))


@fuzzed(150)
@given(latent_format=FORMATS, data=st.data())
def test_illegal_cache_update(latent_format: CacheFormat | None, data: st.DataObject) -> None:
    z, cache, slots = data.draw(updates(latent_format))
    assert_refused(data.draw(illegal_cache_update(z, cache, slots, latent_format)))


@fuzzed(150)
@given(call=illegal_value_up())
def test_illegal_value_up(call: Call) -> None:
    assert_refused(call)
