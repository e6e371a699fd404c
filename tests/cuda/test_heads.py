"""Head outputs where CUDA C++ decodes: value latents are merged and projected in one launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from recalkv_vllm.ops import cuda
from recalkv_vllm.ops.triton.launch import Launch
from tests.cuda.test_binding import DEVICE, DTYPE, needs_triton
from tests.cuda.test_tracing import NAMESPACE
from tests.ops.cases import AttentionCase, build, spanned
from tests.ops.checks import assert_within
from tests.ops.rounding import allowed_heads_error
from tests.ops.test_attend_heads import heads_in_torch
from tests.ops.tracing import RecordedCalls

BATCH = ((1, 45), (2, 300), (0, 0), (1, 1), (20, 70))
CASE = spanned("decodes-first", (8, 2, 64), 1, 32, 2, 32, batch=BATCH, padding_rows=2)
SINKS = replace(CASE, name="sinks", sinks=True)
DECODES = spanned("decodes", (8, 2, 64), 1, 48, 1, 80, batch=BATCH[:4])
HINTS = {"num_decodes": 4, "num_decode_tokens": 4, "max_decode_query_len": 2}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Triton's kernels, in the order of their launches."""
    made: list[str] = []
    run = Launch.run

    def noting(launch: Launch) -> None:
        made.append(launch.kernel.__name__)
        run(launch)

    monkeypatch.setattr(Launch, "run", noting)
    return made


def check(case: AttentionCase, **hints: int) -> list[str]:
    """Compare with torch; returns the CUDA kernels that ran."""
    _, exact, _ = heads_in_torch(case, DTYPE, bias=True)
    inputs = build(case, DTYPE, DEVICE).change(**hints)
    bias = torch.randn(inputs.layer.v_up.shape[:2], generator=torch.Generator().manual_seed(1))
    inputs = inputs.change(v_bias=bias.to(DEVICE, DTYPE))
    out = torch.full_like(inputs.q, torch.nan)
    with RecordedCalls(NAMESPACE) as calls:
        assert cuda.bind(inputs.layer).attend_heads(*inputs.call, out=out) is out
    rows = sum(queries for queries, _ in case.batch)
    allowed = allowed_heads_error(inputs, DTYPE)
    assert_within(out[:rows].cpu(), exact[:rows], allowed[:rows].cpu(), str(case))
    assert out[rows:].isfinite().all()
    return [op._schema.name.partition("::")[2] for op, _ in calls.calls]


@needs_triton
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_decodes_take_two_launches(
    cut: bool, cutting: Callable[[bool], None], launched: list[str]
) -> None:
    cutting(cut)
    assert check(DECODES) == ["decode"]
    assert launched == [*["cut_batch"] * cut, "project_values"]


@needs_triton
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_sinks_take_no_launch(
    cut: bool, cutting: Callable[[bool], None], launched: list[str]
) -> None:
    cutting(cut)
    assert check(replace(DECODES, name="decodes with sinks", sinks=True)) == ["decode"]
    assert launched == [*["cut_batch"] * cut, "project_values"]
    launched.clear()
    check(SINKS, **HINTS)


@needs_triton
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_other_sequences_are_tritons(
    cut: bool,
    cutting: Callable[[bool], None],
    launched: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cutting(cut)
    monkeypatch.delenv("RECALKV_KERNEL")
    assert check(CASE, **HINTS) == ["decode"]
    rest = ["cut_batch", "latent_attention", "project_values"]
    assert launched == [*["cut_batch"] * cut, "project_values", *rest]
