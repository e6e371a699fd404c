"""Prompts attended as dense keys and values, with vLLM's FlashAttention in plain torch."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recalkv_vllm.ops import Batch, CheckedLayer
from recalkv_vllm.serving.attention import implementation
from recalkv_vllm.serving.attention.dense_prefill import DensePrefill
from recalkv_vllm.serving.attention.metadata import LatentMetadata
from recalkv_vllm.serving.attention.prefills import Prefills, cut_context
from tests.flash_attention import flash
from tests.ops.cases import AttentionCase, build, spanned
from tests.ops.test_attend_heads import heads_in_torch

SEQUENCES = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 200)), min_size=1, max_size=6
).filter(lambda pairs: any(queries for queries, _ in pairs))


@given(SEQUENCES, st.integers(0, 100))
def test_slices_cover_every_context_once(sequences: list[tuple[int, int]], room: int) -> None:
    queries = [count for count, _ in sequences]
    lengths = [count and count + context for count, context in sequences]
    capacity = sum(queries) + len(queries) + room
    slices = cut_context(queries, lengths, capacity)
    assert all(sum(end - start for start, end in each) <= capacity for each in slices)
    for i, (count, length) in enumerate(zip(queries, lengths, strict=True)):
        stretches = [each[i] for each in slices]
        assert stretches[0].end == length
        assert stretches[0].start <= length - count
        assert all(older.end == newer.start for newer, older in pairwise(stretches))
        assert stretches[-1].start == 0
    assert all(sum(end - start for start, end in each) > 0 for each in slices)


def test_windows_take_one_slice_or_none() -> None:
    assert cut_context([3, 2], [10, 50], 12, window=4) == [[(4, 10), (45, 50)]]
    assert cut_context([3, 2], [10, 50], 11, window=4) == [[(4, 10), (45, 50)]]
    assert cut_context([3, 2], [10, 50], 10, window=4) is None


MIXED = ((5, 70), (20, 20), (0, 0), (9, 130), (1, 1))
CASES = (
    spanned("split", (4, 2, 64), 1, 32, 2, 32, batch=MIXED, padding_rows=2),
    spanned("soft-cap", (4, 2, 64), 1, 32, 2, 32, batch=MIXED, soft_cap=3.0),
    spanned("window", (4, 2, 64), 1, 32, 2, 32, batch=MIXED, sliding_window=24),
    spanned("sinks", (6, 2, 64), 1, 32, 2, 32, batch=MIXED, sinks=True, padding_rows=2),
    spanned("norm-and-bias", (6, 2, 32), 2, 32, 1, 48, batch=MIXED, key_norm=True, key_bias=True),
)


@pytest.fixture(autouse=True)
def reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECALKV_KERNEL", "reference")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("capacity", [75, 90, 1000])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_prompts(
    case: AttentionCase, capacity: int, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckedLayer, "prefers_dense", lambda *_: True)
    _, exact, _ = heads_in_torch(case, torch.float32, bias=False)
    inputs = build(case, torch.float32)
    dense = DensePrefill(
        CheckedLayer(inputs.layer), inputs.layer, flash(version), case.num_heads, capacity
    )
    prefills = Prefills(inputs.batch, inputs.batch.query_start_loc, inputs.batch.seq_lens)
    slices = dense.slices(prefills)
    if case.sliding_window is not None and capacity < 81:
        assert slices is None
        return
    assert slices is not None
    assert (len(slices) > 1) == (capacity < 222 and case.sliding_window is None)
    out = torch.full_like(inputs.q, torch.nan)
    dense.attend(inputs.q, inputs.kv_cache, prefills, slices, out)
    rows = prefills.num_tokens
    torch.testing.assert_close(out[:rows].double(), exact[:rows], rtol=1e-4, atol=1e-4)
    assert (out[rows:] == 0).all()


@pytest.mark.parametrize("dense", [True, False])
def test_decodes_beside_prompts(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM calls on a GPU: decodes attend to latents, prompts to what the layer prefers."""
    monkeypatch.setattr(implementation, "FORWARD_UPDATES_CACHE", False)
    calls: list[int] = []
    monkeypatch.setattr(
        CheckedLayer, "prefers_dense", lambda *given: calls.append(given[2]) or dense
    )
    monkeypatch.setattr(implementation, "flash_attention", lambda *_: flash(3))
    batch = ((1, 33), (1, 7), (20, 50), (40, 40))
    case = spanned("mixed", (4, 2, 64), 1, 32, 2, 32, batch=batch, padding_rows=2)
    _, exact, _ = heads_in_torch(case, torch.float32, bias=False)
    inputs = build(case, torch.float32).change(num_decodes=2, num_decode_tokens=2)
    limits = implementation.BatchLimits(4, 8, 1, 1024, 64)
    width = inputs.kv_cache.shape[2]
    impl = implementation.LatentAttentionImpl(4, 64, inputs.layer.scale, limits, width)
    impl.bind(inputs.layer)
    given: Batch = inputs.batch
    prefills = Prefills(given, given.query_start_loc, given.seq_lens)
    metadata = LatentMetadata(given, len(inputs.q), prefills)
    out, cache = torch.full_like(inputs.q, torch.nan), inputs.kv_cache[:, None]
    impl.forward(None, inputs.q, None, None, cache, metadata, out)
    torch.testing.assert_close(out[:62].double(), exact[:62], rtol=1e-4, atol=1e-4)
    assert out[62:].isfinite().all()
    assert calls == [30]
