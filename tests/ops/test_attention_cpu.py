"""The C++ attention against the float64 oracle, on every instruction set of this processor."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from recalkv_vllm.band_format import PLANES, BandFormat
from recalkv_vllm.latent_format import BITS
from recalkv_vllm.ops import bind, cpu, reference
from recalkv_vllm.ops.contract import BoundLayer, LatentLayer
from tests.ops.band_cases import BAND_CASES, banded
from tests.ops.cases import (
    CASES,
    MIXED,
    QUANTIZED_CASES,
    AttentionCase,
    attend,
    build,
    joint,
    quantized,
    spanned,
)
from tests.ops.checks import assert_matches_oracle, difference
from tests.ops.cpu_versions import DTYPES, VERSIONS, poison_free_memory

#: Many rows, which take several tiles at once: three slices of them (in bf16), and a window that
#: leaves some tiles of a slice out.
WIDE: tuple[int, int, int] = (4, 4, 112)
SLICES: tuple[AttentionCase, ...] = (
    spanned("slices", WIDE, 4, 48, 1, 144, batch=((60, 300), (1, 40), (130, 130))),
    spanned("slices-window", WIDE, 4, 48, 2, 48, batch=((60, 420),), sliding_window=130),
    spanned("slices-norm", (4, 2, 64), 1, 32, 2, 64, batch=((50, 560),), key_norm=True),
    *quantized((joint("slices-joint", (6, 2, 64), 2, 96, batch=((50, 450),)),), "int4", 32),
)


@pytest.mark.parametrize(("isa", "dtype"), VERSIONS, ids=str)
@pytest.mark.parametrize("case", CASES + QUANTIZED_CASES + BAND_CASES + SLICES, ids=str)
def test_matrix(
    case: AttentionCase, isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECALKV_CPU_ISA", isa)
    inputs = build(case, dtype)
    poison_free_memory(case)
    assert_matches_oracle(attend(inputs), case, dtype)


@pytest.mark.parametrize("bind_layer", [cpu.bind, reference.bind], ids=["cpu", "reference"])
def test_rows_of_no_sequence_are_zero(bind_layer: Callable[[LatentLayer], BoundLayer]) -> None:
    case = next(case for case in CASES if case.name == "mixed")
    inputs = build(case, torch.float32)
    poison_free_memory(case)
    o_lat, _ = bind_layer(inputs.layer).attend(*inputs.call)
    assert case.padding_rows == 3
    assert o_lat[-3:].eq(0).all()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    "name",
    [
        "decode-long",
        "mixed",
        "one-v-group-many-k",
        "prefill",
        "odd-joint-int4-32",
        "bands-joint-four",
        "bands-long",
    ],
)
def test_splits_between_threads(name: str, threads: int) -> None:
    cases = CASES + QUANTIZED_CASES + BAND_CASES
    case = next(case for case in cases if case.name == name)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            result = attend(build(case, dtype))
            assert_matches_oracle(result, case, dtype)
    finally:
        torch.set_num_threads(before)


def test_result_depends_on_each_argument() -> None:
    """A case where everything matters: leaving anything out must show."""
    case = next(case for case in CASES if case.name == "everything")
    inputs = build(case, torch.float32)
    rows = sum(queries for queries, _ in case.batch)
    base = attend(inputs)
    changes = {
        "is_neox": True,
        "k_bias": None,
        "k_norm_weight": inputs.layer.k_norm_weight.flip(0),
        "cos_sin_cache": None,
        "sliding_window": None,
        "soft_cap": None,
        "scale": 0.2,
        "v_spans": [(0, 48)],
        "k_spans": [(16, 80)],
    }
    for name, value in changes.items():
        changed = attend(inputs.change(**{name: value}))
        assert difference(changed[0], base[0], rows) > 1e-2, name


def test_query_that_is_a_view_of_a_wider_tensor() -> None:
    case = spanned("view", (4, 2, 64), 1, 32, 2, 32, batch=MIXED)
    inputs = build(case, torch.float32)
    wide = torch.full((inputs.q.shape[0], 4 * 64 + 40), torch.nan)
    view = wide[:, 8 : 8 + 4 * 64].view(-1, 4, 64)
    view.copy_(inputs.q)
    result = attend(inputs.change(q=view))
    assert_matches_oracle(result, case, torch.float32)


def test_nan_in_the_cache_reaches_the_output() -> None:
    """A model's own NaN must not be turned into a plausible number."""
    case = spanned("nan", (4, 2, 64), 1, 32, 2, 32, batch=((1, 20),))
    inputs = build(case, torch.bfloat16)
    inputs.kv_cache[inputs.batch.block_table[0, 0], 3] = torch.nan
    o_lat, lse = attend(inputs)
    assert o_lat.isnan().all()
    assert lse.isnan().all()


NAN = spanned("nan", (4, 2, 64), 1, 32, 2, 32, batch=((1, 20),))


@pytest.mark.parametrize(
    "case",
    [
        *(case for dtype in BITS for case in quantized([NAN], dtype, 0)),
        *(banded(NAN, *[((32, 2),)] * 2, *[((32, bits),)] * 2) for bits in PLANES),
    ],
    ids=lambda case: str(case.latent_format),
)
def test_nan_in_a_quantized_latent_reaches_the_output(case: AttentionCase) -> None:
    inputs = build(case, torch.bfloat16)
    z = torch.zeros(1, case.rank, dtype=torch.bfloat16)
    z[0, 77] = torch.nan
    if isinstance(case.latent_format, BandFormat):
        z[0, ::32] = torch.nan  # a scale is of few columns
    slot = inputs.batch.block_table[0, :1] * case.block_size + 3
    bind(inputs.layer).update_cache(z, inputs.kv_cache, slot)
    o_lat, lse = attend(inputs)
    assert o_lat.isnan().all()
    assert lse.isnan().all()


@pytest.mark.parametrize("length", [20, 900])
def test_nan_in_a_query_reaches_its_output_alone(length: int) -> None:
    case = spanned("nan", (4, 2, 64), 1, 32, 2, 32, batch=((1, length), (1, length)))
    inputs = build(case, torch.bfloat16)
    inputs.q[0, 1] = torch.nan
    o_lat, lse = attend(inputs)
    assert o_lat[0, 1].isnan().all()
    assert lse[0, 1].isnan()
    assert int(lse.isnan().sum()) == 1


def test_no_sequences() -> None:
    case = spanned("empty", (4, 2, 64), 1, 32, 2, 32, batch=((1, 20),))
    inputs = build(case, torch.float32)
    none = {"q": inputs.q[:0], "query_start_loc": torch.zeros(1, dtype=torch.int32)}
    none |= {"block_table": inputs.batch.block_table[:0], "seq_lens": inputs.batch.seq_lens[:0]}
    o_lat, lse = attend(inputs.change(**none))
    assert o_lat.shape == (0, 4, 32)
    assert lse.shape == (0, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bound_call_from_several_threads(dtype: torch.dtype) -> None:
    case = spanned("threads", (4, 2, 64), 1, 32, 2, 32, batch=MIXED)
    inputs = build(case, dtype)
    bound = bind(inputs.layer)
    results: list[tuple[torch.Tensor, torch.Tensor]] = []
    workers = [
        threading.Thread(target=lambda: results.append(bound.attend(*inputs.call)))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4
    for result in results:
        assert_matches_oracle(result, case, dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_lens": [38]}, r"kv_cache|seq_lens\[0\]: expected"),
        ({"seq_lens": [2000]}, r"seq_lens\[0\]: expected 1 .* to \d+ .*, found 2000"),
        ({"query_start_loc": [0, 2]}, r"query_start_loc\[1\]: expected 0 to 1 .*, found 2"),
        ({"block_table": [[99, 0, 0, 0, 0]]}, r"block_table\[0, 0\]: .* found 99"),
        ({"block_table": [[0, -1, 0, 0, 0]]}, r"block_table\[0, 1\]: .* found -1"),
    ],
)
def test_values_that_would_read_foreign_memory(change: dict, message: str) -> None:
    case = spanned("bad", (4, 2, 64), 1, 32, 2, 32, batch=((1, 37),))
    inputs = build(case, torch.float32)
    name, value = next(iter(change.items()))
    inputs = inputs.change(**{name: torch.tensor(value, dtype=torch.int32)})
    if name == "seq_lens" and value == [38]:
        inputs = inputs.change(cos_sin_cache=inputs.layer.cos_sin_cache[:37])
    with pytest.raises(ValueError, match=message):
        attend(inputs)


def test_window_longer_than_any_sequence_is_no_window() -> None:
    case = spanned("wide", (4, 2, 64), 1, 32, 2, 32, batch=MIXED)
    inputs = build(case, torch.float32)
    result = attend(inputs.change(sliding_window=10_000))
    assert_matches_oracle(result, replace(case, sliding_window=None), torch.float32)
