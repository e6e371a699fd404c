"""Head outputs at once: from value latents, or from values that many queries share."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from recalkv_vllm.ops import bind, cpu, reference
from tests.ops.band_cases import BAND_CASES, banded
from tests.ops.cases import CASES, EVERY_OPTION, AttentionCase, build, quantized, spanned
from tests.ops.checks import assert_within
from tests.ops.cpu_versions import DTYPES, VERSIONS, poison_free_memory
from tests.ops.rounding import allowed_heads_error

#: Prefill with and without context, beside sequences of few queries and one of none.
PREFILL: tuple[tuple[int, int], ...] = ((1, 45), (150, 150), (0, 0), (90, 300), (3, 50), (230, 231))

#: Values are as wide as 32 or 64, their latents wider.
DENSE_CASES: tuple[AttentionCase, ...] = (
    spanned("dense", (9, 3, 64), 1, 64, 3, 128, batch=PREFILL, padding_rows=2),
    spanned("dense-overlapping", (9, 3, 64), 3, 96, 1, 224, overlap=64, batch=PREFILL),
    spanned("dense-d32", (8, 2, 32), 1, 32, 2, 48, batch=PREFILL, cache="tokens"),
    spanned("dense-sinks", (8, 2, 64), 2, 64, 1, 96, batch=PREFILL, sinks=True, padding_rows=1),
    spanned("dense-d80", (8, 1, 80), 1, 48, 1, 176, batch=PREFILL, cache="blocks"),
    spanned(
        "dense-everything",
        (6, 2, 64),
        2,
        64,
        1,
        112,
        overlap=16,
        **(EVERY_OPTION | {"batch": PREFILL}),
    ),
)
SINKS = next(case for case in CASES if case.name == "sinks")
STORED: tuple[AttentionCase, ...] = (
    *quantized(DENSE_CASES[:2], "int8", 32),
    *quantized(DENSE_CASES[:1], "int4", 0),
    banded(DENSE_CASES[0], *[((32, 6), (32, 2))] * 3, *[((64, 8), (32, 4), (32, 3))] * 3),
)


@lru_cache(1)
def heads_in_torch(case: AttentionCase, dtype: torch.dtype, bias: bool) -> tuple[Any, ...]:
    """Inputs, the result in float64, and what it may differ by."""
    inputs = build(case, dtype)
    if bias:
        generator = torch.Generator().manual_seed(1)
        shape = inputs.layer.v_up.shape[:2]
        inputs = inputs.change(v_bias=torch.randn(shape, generator=generator).to(dtype))
    layer = inputs.layer
    exact = reference.paged_latent_heads(layer, *inputs.call, compute_dtype=torch.float64)
    return inputs, exact, allowed_heads_error(inputs, dtype)


@pytest.mark.parametrize(("isa", "dtype"), VERSIONS, ids=str)  # all with one reference
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", DENSE_CASES + STORED, ids=str)
def test_many_queries(
    case: AttentionCase, isa: str, dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECALKV_CPU_ISA", isa)
    inputs, exact, allowed = heads_in_torch(case, dtype, bias)
    bound = cpu.bind(inputs.layer)
    poison_free_memory(case)
    heads = bound.attend_heads(*inputs.call)
    rows = sum(queries for queries, _ in case.batch)
    assert heads.dtype == dtype
    assert_within(heads[:rows], exact[:rows], allowed[:rows], str(case))
    assert heads[rows:].eq(0).all()
    # They went another way than value latents: the results differ by rounding.
    assert not torch.equal(heads, bound.value_up(bound.attend(*inputs.call)[0]))


@pytest.mark.parametrize("threads", [1, 2, 5])  # all with one reference
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [CASES[1], *CASES[5:9], SINKS, *BAND_CASES[:2]], ids=str)
def test_few_queries(case: AttentionCase, dtype: torch.dtype, threads: int) -> None:
    inputs, exact, allowed = heads_in_torch(case, dtype, bias=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        bound = bind(inputs.layer)
        poison_free_memory(case)
        heads = bound.attend_heads(*inputs.call)
        expected = bound.value_up(bound.attend(*inputs.call)[0])
    finally:
        torch.set_num_threads(before)
    rows = sum(queries for queries, _ in case.batch)
    assert_within(heads[:rows], exact[:rows], allowed[:rows], str(case))
    assert torch.equal(heads[:rows], expected[:rows]) == (not case.sinks)


def test_no_sequences() -> None:
    inputs = build(DENSE_CASES[0], torch.float32)
    none = {"q": inputs.q[:0], "query_start_loc": torch.zeros(1, dtype=torch.int32)}
    none |= {"block_table": inputs.batch.block_table[:0], "seq_lens": inputs.batch.seq_lens[:0]}
    changed = inputs.change(**none)
    assert bind(changed.layer).attend_heads(*changed.call).shape == (0, 9, 64)


def test_nan_in_a_latent_reaches_the_queries_that_see_it() -> None:
    inputs = build(DENSE_CASES[0], torch.bfloat16)
    position = 40
    block = inputs.batch.block_table[1, position // inputs.kv_cache.shape[1]]
    inputs.kv_cache[block, position % inputs.kv_cache.shape[1], -1] = torch.nan  # of the last head
    heads = bind(inputs.layer).attend_heads(*inputs.call)[1:151]
    assert heads[position:, 6:].isnan().all()
    assert not heads[:, :6].isnan().any()
