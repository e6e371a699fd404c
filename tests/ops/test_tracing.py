"""The C++ ops under fake tensors: what ``torch.compile`` and memory profiling see of them."""

from __future__ import annotations

import pytest
import torch

from recalkv_vllm.band_format import BandFormat, CacheFormat
from recalkv_vllm.latent_format import LatentFormat
from recalkv_vllm.ops import bind, cpu
from tests.ops.band_cases import banded
from tests.ops.cases import (
    MIXED,
    AttentionCase,
    attend,
    build,
    caching_layer,
    quantized,
    spanned,
    value_layer,
)
from tests.ops.tracing import RecordedCalls, ops_on_tensors

NAMESPACE = "recalkv_cpu"
UPDATE, ATTENTION, HEADS, VALUE_UP = (
    f"{NAMESPACE}::{name}"
    for name in (
        "latent_cache_update",
        "paged_latent_attention",
        "paged_latent_attention_heads",
        "latent_value_up",
    )
)
PLAIN = spanned("plain", (4, 2, 64), 1, 32, 2, 32, batch=MIXED)
CASES = (
    PLAIN,
    spanned("gqa-one-v-group", (9, 3, 64), 3, 96, 1, 80, batch=MIXED),
    spanned("strided", (4, 2, 64), 1, 32, 2, 32, batch=MIXED, cache="tokens"),
    spanned(
        "norm-bias-window-cap", (4, 2, 64), 2, 64, 2, 32,
        batch=MIXED, key_bias=True, key_norm=True, sliding_window=24, soft_cap=3.0, sinks=True,
    ),
    spanned("no-rope", (4, 2, 64), 1, 32, 2, 32, batch=MIXED, rot_dim=0),
    *quantized((PLAIN,), "int8", 32),
    *quantized((PLAIN,), "int4", 0),
    banded(PLAIN, *[((32, 3),)] * 2, *[((32, 6),)] * 2),
)  # fmt: skip


def test_every_op_has_a_test_here() -> None:
    assert cpu.unsupported_reason(torch.device("cpu"), torch.float32, 64) is None
    assert ops_on_tensors(NAMESPACE) == {UPDATE, ATTENTION, HEADS, VALUE_UP}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: AttentionCase, dtype: torch.dtype) -> None:
    inputs = build(case, dtype)
    with RecordedCalls(NAMESPACE) as recorded:
        attend(inputs)
    recorded.check(ATTENTION)
    with RecordedCalls(NAMESPACE) as recorded:
        bind(inputs.layer).attend_heads(*inputs.call)
    recorded.check(HEADS)


@pytest.mark.parametrize(
    "latent_format",
    [
        None,
        LatentFormat("int8", 32),
        LatentFormat("fp8", 16),
        BandFormat(((32, 3), (32, 2))),
    ],
    ids=str,
)
def test_cache_update(latent_format: CacheFormat | None) -> None:
    cache = torch.zeros(2, 16, 64)
    if latent_format is not None:
        cache = torch.zeros(2, 16, latent_format.slot_bytes(64), dtype=torch.uint8)
    with RecordedCalls(NAMESPACE) as recorded:
        bind(caching_layer(latent_format)).update_cache(
            torch.randn(5, 64), cache, torch.tensor([3, -1, 0, 31, -1])
        )
    recorded.check(UPDATE)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_value_up(bias: bool, out_dtype: torch.dtype) -> None:
    v_up, v_bias = torch.randn(2, 32, 16), torch.randn(2, 32) if bias else None
    with RecordedCalls(NAMESPACE) as recorded:
        bind(value_layer(v_up, v_bias)).value_up(torch.randn(3, 4, 16), out_dtype)
    recorded.check(VALUE_UP)
