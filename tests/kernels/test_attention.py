"""The attention kernels in Triton's interpreter, against the float64 oracle.

Every case of the matrix runs in float32, where an indexing or masking fault stands out most; what
depends on the dtype (rounding, the local rotation's table) runs in bfloat16 and float16 on a few.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recalkv_vllm.kernels import heuristics
from recalkv_vllm.ops import Batch, BatchLimits, workspace
from recalkv_vllm.ops import triton as ops
from recalkv_vllm.ops.triton import TritonLayer
from recalkv_vllm.ops.triton.attention import TritonAttention
from recalkv_vllm.ops.triton.launch import Launch
from recalkv_vllm.ops.triton.plan import Part
from tests.kernels.pieces import cut_into
from tests.ops.cases import (
    CASES,
    MIXED,
    QUANTIZED_CASES,
    AttentionCase,
    AttentionInputs,
    build,
    spanned,
)
from tests.ops.checks import assert_matches_oracle
from tests.ops.padding import PADDED_CALLS, padded_call
from tests.ops.replay import PADDED, GraphMemory

BY_NAME = {case.name: case for case in CASES + QUANTIZED_CASES}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW_PRECISION = (
    "decode-lengths",
    "joint-per-head",
    "low-precision-table",
    "everything",
    "odd-split-int8-0",
    "odd-joint-fp8-16",
    "odd-overlapping-int4-32",
    "odd-with-gaps-int3-64",
)


@cache
def inputs_of(case: AttentionCase, dtype: torch.dtype) -> AttentionInputs:
    return build(case, dtype, DEVICE)


def bind(inputs: AttentionInputs) -> TritonLayer:
    return ops.bind(inputs.layer)


def check(case: AttentionCase, dtype: torch.dtype = torch.float32, **hints: int) -> None:
    inputs = inputs_of(case, dtype).change(**hints)
    assert_matches_oracle(bind(inputs).attend(*inputs.call), case, dtype)


def change_config(monkeypatch: pytest.MonkeyPatch, **changes: int) -> None:
    chosen = heuristics.attention_config
    monkeypatch.setattr(
        heuristics,
        "attention_config",
        lambda *arguments: replace(chosen(*arguments), **changes),
    )


@pytest.mark.parametrize("case", CASES + QUANTIZED_CASES[::2], ids=str)
def test_matrix(case: AttentionCase) -> None:
    check(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOW_PRECISION)
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    check(BY_NAME[name], dtype)


@pytest.mark.parametrize("pieces", [2, 5])
@pytest.mark.parametrize("name", ["mixed", "window", "decode-long"])
def test_pieces(name: str, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More pieces than tiles, windows, sequences of no tokens."""
    cut_into(pieces, monkeypatch)
    check(BY_NAME[name])


@pytest.mark.parametrize("window", [None, 100])
def test_one_long_sequence_among_short_ones(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_into(4, monkeypatch)
    batch = ((1, 30), (1, 900), (0, 0), (3, 5), (1, 1), (2, 200))
    case = spanned("skewed", (6, 2, 64), 1, 32, 2, 48, batch=batch, padding_rows=2)
    check(replace(case, sliding_window=window))


@pytest.mark.parametrize("pieces", [1, 3])
def test_decodes_first(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixed batch whose decodes go through the decode launch, at two query lengths."""
    cut_into(pieces, monkeypatch)
    batch = ((1, 45), (3, 50), (0, 0), (2, 2), (20, 20), (13, 47))
    case = spanned("decodes-first", (4, 2, 64), 1, 32, 2, 32, batch=batch, padding_rows=2)
    check(case, num_decodes=4, num_decode_tokens=6, max_decode_query_len=3, max_seq_len=64)


def test_decodes_only() -> None:
    case = BY_NAME["decode-lengths"]
    check(case, num_decodes=6, num_decode_tokens=6)


def test_more_verified_queries_than_rows() -> None:
    """Sixteen queries of many heads do not fit one program's rows."""
    case = spanned("verify-16", (16, 1, 32), 1, 32, 1, 32, batch=((16, 40), (9, 9)))
    check(case, num_decodes=2, num_decode_tokens=25, max_decode_query_len=16)


@pytest.mark.parametrize("late_values", [False, True])
@pytest.mark.parametrize("name", ["gqa3-smollm2", "overlapping", "d80", "odd-joint-int3-16"])
def test_streamed_factors(name: str, late_values: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    change_config(monkeypatch, stream=16, late_values=late_values)
    check(BY_NAME[name])


def test_value_columns_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    change_config(monkeypatch, v_block=32)
    check(BY_NAME["gqa3-smollm2"])


def test_positions_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    change_config(monkeypatch, local_rope=False)
    check(BY_NAME["interleaved-partial"])


def test_nan_in_the_cache_reaches_the_output() -> None:
    """A model's own NaN must not be turned into a plausible number."""
    case = spanned("nan", (4, 2, 64), 1, 32, 2, 32, batch=((1, 200),))
    inputs = build(case, torch.float32, DEVICE)
    inputs.kv_cache[inputs.batch.block_table[0, 0], 3] = torch.nan
    o_lat, lse = bind(inputs).attend(*inputs.call)
    assert o_lat.isnan().all()
    assert lse.isnan().all()


def test_no_sequences() -> None:
    inputs = build(BY_NAME["mixed"], torch.float32, DEVICE)
    batch = inputs.batch
    nothing = {"q": inputs.q[:0], "block_table": batch.block_table[:0]}
    nothing |= {"seq_lens": batch.seq_lens[:0], "query_start_loc": batch.query_start_loc[:1]}
    o_lat, lse = bind(inputs).attend(*inputs.change(**nothing).call)
    assert o_lat.shape == (0, 4, 32)
    assert lse.shape == (0, 4)


class NoDeviceReads(TorchDispatchMode):
    """Fails on whatever would make the host wait for a value on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        reads = ("_local_scalar_dense", "nonzero", "_to_copy", "masked_select", "equal")
        assert not any(read in name for read in reads), f"{name} reads the device"
        return func(*args, **(kwargs or {}))


class NoFills(TorchDispatchMode):
    """Fails on a launch of torch's own that would fill memory."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in func.name() for name in ("fill", "zero", "full")), func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("hinted", [False, True])
def test_launches_read_nothing_from_the_device(
    hinted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call is what a CUDA graph captures: same launches whatever the tensors hold."""
    case = spanned("graph", (4, 2, 64), 1, 32, 2, 32, batch=((1, 30), (1, 60), (9, 20)))
    hints = {"num_decodes": 2, "num_decode_tokens": 2, "max_seq_len": 500} if hinted else {}
    inputs = build(case, torch.float32, DEVICE).change(**hints)
    layer = bind(inputs)
    recorded: list[tuple] = []
    monkeypatch.setattr(
        Launch, "run", lambda self: recorded.append((self.kernel.__name__, self.grid))
    )
    with NoDeviceReads():
        layer.attend(*inputs.call)
        first = recorded.copy()
        inputs.batch.seq_lens.fill_(9)
        layer.attend(*inputs.call)
    assert recorded == first * 2
    assert first


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("name", PADDED)
def test_replayed_launches_serve_padded_batches(
    name: str, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_into(pieces, monkeypatch)
    memory = GraphMemory(name, torch.float32, DEVICE)
    run, graph = Launch.run, []
    monkeypatch.setattr(Launch, "run", lambda self: (graph.append(self), run(self)))
    result = bind(memory.inputs).attend(*memory.inputs.call)
    captured = tuple(graph)
    memory.show_batch()
    for output in result:
        output.fill_(torch.nan)
    for one in captured:
        run(one)
    assert captured
    assert_matches_oracle(result, memory.case, torch.float32)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("name", PADDED_CALLS)
def test_rows_of_no_sequence_are_cleared(
    name: str, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the launches themselves, in outputs and a workspace that start as NaN."""
    cut_into(pieces, monkeypatch)
    assert torch.empty(8, device=DEVICE).isnan().all()
    case, inputs = padded_call(name, torch.float32, DEVICE)
    layer = bind(inputs)
    with NoFills() if name != "after-the-hint" else nullcontext():
        result = layer.attend(*inputs.call)
    assert_matches_oracle(result, case, torch.float32)


def test_rows_without_a_sequence() -> None:
    inputs = inputs_of(BY_NAME["mixed"], torch.float32)
    batch = inputs.batch
    nothing = {"block_table": batch.block_table[:0], "seq_lens": batch.seq_lens[:0]}
    nothing["query_start_loc"] = batch.query_start_loc[:1]
    o_lat, lse = bind(inputs).attend(*inputs.change(**nothing).call)
    assert o_lat.eq(0).all()
    assert lse.eq(-torch.inf).all()


@pytest.mark.parametrize("bounded", [True, False], ids=["decode", "prefill"])
def test_workspace_covers_every_batch(bounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(BY_NAME["decode-lengths"], torch.float32)
    attention = TritonAttention(inputs.layer, heuristics.Target(90, 132))
    asked: list[int] = []

    def reserve(device: torch.device, nbytes: int) -> torch.Tensor:
        asked.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    monkeypatch.setattr(workspace, "reserve_workspace", reserve)
    for count in (*range(1, 40), 1000):
        part = Part(3, count, range(5, 5 + 2 * count), 2, bounded)
        q = torch.zeros(5 + 2 * count, 4, 64, device=DEVICE)
        index = torch.zeros(count + 4, dtype=torch.int32, device=DEVICE)
        table = torch.zeros(count + 3, 50, dtype=torch.int32, device=DEVICE)
        out = torch.zeros(len(q), 4, 32, device=DEVICE)
        batch = Batch(table, index[1:], index, max_seq_len=100_000)
        lse = out[:, :, 0].contiguous()
        list(attention.launches(part, q, inputs.kv_cache, batch, out, lse))
    assert len(asked) > 20
    limits = BatchLimits(
        num_heads=4, num_seqs=1000, decode_query_len=2, seq_len=100_000, num_tokens=2000
    )
    assert max(asked) <= attention.planner.workspace_bytes(limits)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "reason"),
    [
        ("cpu", torch.float64, 64, "expected float32, bfloat16 or float16, found torch.float64"),
        ("cpu", torch.float32, 63, "expected an even head size up to 256, found 63"),
        ("cpu", torch.float32, 512, "expected an even head size up to 256, found 512"),
        ("cpu", torch.float32, 64, None),
        ("cpu", torch.float32, None, None),
    ],
)
def test_unsupported_reason(
    device: str, dtype: torch.dtype, head_dim: int | None, reason: str | None
) -> None:
    assert ops.unsupported_reason(torch.device(device), dtype, head_dim) == reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_says_that_float32_is_slow_on_a_gpu(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "target_of", lambda device: heuristics.Target(90, 132))
    said = ops.describe(torch.device("cuda"), dtype)
    assert "sm_90" in said
    assert ("slow, serve in bfloat16" in said) == (dtype == torch.float32)


def test_mixed_matches_itself_row_by_row() -> None:
    """A sequence's result does not depend on its neighbors in the batch."""
    inputs = inputs_of(BY_NAME["mixed"], torch.float32)
    layer, batch = bind(inputs), inputs.batch
    whole, _ = layer.attend(*inputs.call)
    start, end = batch.query_start_loc[4:6].tolist()
    one = Batch(
        block_table=batch.block_table[4:5],
        seq_lens=batch.seq_lens[4:5],
        query_start_loc=torch.tensor([0, end - start], dtype=torch.int32, device=DEVICE),
    )
    alone, _ = layer.attend(inputs.q[start:end], inputs.kv_cache, one)
    assert MIXED[4][0] == end - start
    torch.testing.assert_close(alone, whole[start:end], rtol=1e-5, atol=1e-5)
