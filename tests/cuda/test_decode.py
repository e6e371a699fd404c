"""The CUDA decode kernel, emulated, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recalkv_vllm.ops import cuda
from recalkv_vllm.ops.cuda import CudaLayer, attention, extension
from recalkv_vllm.ops.cuda import plan as cuda_plan
from recalkv_vllm.ops.cuda.plan import HEAD_DIMS, INSTANTIATIONS, STREAMING
from recalkv_vllm.ops.cuda.shapes import LayerShape, Limits, Plan
from tests.ops.cases import CASES, AttentionCase, build, joint, spanned
from tests.ops.checks import assert_close_to_oracle, assert_matches_oracle, expected_of
from tests.ops.strategies import attention_cases

Configure = Callable[[int, int], None]
SUPPORTED = [case for case in CASES if case.head_dim in HEAD_DIMS]
BF16 = torch.bfloat16
KINDS = [(rows, v, True) for rows in INSTANTIATIONS for v in INSTANTIATIONS[rows]]
KINDS.append((*STREAMING, False))

DEVICE = "cuda" if torch.cuda.is_available() and extension.load_error is None else "cpu"


def attend(
    case: AttentionCase, dtype: torch.dtype = BF16
) -> tuple[CudaLayer, tuple[torch.Tensor, torch.Tensor]]:
    """Bind and call, into memory that starts as NaN."""
    inputs = build(case, dtype, DEVICE)
    layer = cuda.bind(inputs.layer)
    tokens, heads, _ = inputs.q.shape
    width = case.v_spans[0].width
    result = (
        torch.full((tokens, heads, width), torch.nan, device=DEVICE),
        torch.full((tokens, heads), torch.nan, device=DEVICE),
    )
    layer.decode.run(*inputs.call, *result)
    return layer, result


def check(case: AttentionCase, dtype: torch.dtype = BF16) -> CudaLayer:
    layer, result = attend(case, dtype)
    assert_matches_oracle(result, case, dtype)
    return layer


def narrow(layer: LayerShape, limits: Limits, column_tiles: int) -> Plan | None:
    """The plan with the fewest warps and the shortest ring: many tiles for each warp."""
    plans = [
        plan
        for v_tiles in INSTANTIATIONS[column_tiles]
        for plan in cuda_plan.candidates(layer, limits, column_tiles, v_tiles, resident=True)
    ]
    return min(plans, key=lambda plan: (plan.heads * plan.teams, plan.stages), default=None)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SUPPORTED, ids=str)
def test_matrix(case: AttentionCase, dtype: torch.dtype, configure: Configure) -> None:
    check(case, dtype)


@pytest.mark.parametrize("case", SUPPORTED, ids=str)
def test_matrix_with_early_copies_on_one_multiprocessor(
    case: AttentionCase,
    configure: Configure,
    multiprocessors: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configure(1, 1)
    multiprocessors(1)
    monkeypatch.setattr(attention, "plan", narrow)
    check(case)


LONG = {
    "gqa": spanned("long", (8, 2, 128), 2, 48, 1, 80, batch=((1, 611), (3, 290), (1, 64))),
    "mha": spanned("long-mha", (2, 2, 64), 1, 32, 2, 32, batch=((1, 700), (2, 333))),
    "joint": joint("long-joint", (6, 3, 64), 3, 96, batch=((1, 511), (4, 512)), key_norm=True),
}


@pytest.mark.parametrize("early", [0, 1])
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("teams", [1, 3])
@pytest.mark.parametrize("name", LONG)
def test_long_streams_of_tiles(
    name: str,
    teams: int,
    stages: int,
    early: int,
    configure: Configure,
    multiprocessors: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rings go round many times, and the result does not depend on who comes first."""

    def chosen(layer: LayerShape, limits: Limits, column_tiles: int) -> Plan | None:
        plan = cuda_plan.plan(layer, limits, column_tiles)
        changed = replace(plan, teams=min(teams, plan.teams), stages=stages)
        needed = cuda_plan.shared_bytes(layer, changed)
        return replace(changed, shared_bytes=needed, blocks_per_multiprocessor=1)

    monkeypatch.setattr(attention, "plan", chosen)
    multiprocessors(1)
    configure(0, early)
    case = LONG[name]
    check(case)
    first = attend(case)[1]
    configure(5, early)
    assert all(torch.equal(a, b) for a, b in zip(first, attend(case)[1], strict=True))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_instantiation(
    kind: tuple[int, int, bool],
    head_dim: int,
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each runs, with a V span wider than it takes at once where that is cheap."""
    column_tiles, v_tiles, resident = kind
    v_width = 16 * v_tiles + 16 if v_tiles <= 8 else 16 * v_tiles - 16
    batch = ((1, 70), (5, 33), (0, 0), (1, 0))
    case = spanned(
        f"{kind}", (6, 2, head_dim), 2, 48, 1, v_width, overlap=16, batch=batch, key_bias=True
    )

    def chosen(layer: LayerShape, limits: Limits, _: int) -> Plan:
        return next(cuda_plan.candidates(layer, limits, column_tiles, v_tiles, resident))

    monkeypatch.setattr(attention, "plan", chosen)
    for dtype in (BF16, torch.float16):
        check(case, dtype)


@pytest.mark.parametrize("count", [1, 3, 40, 200])
def test_any_number_of_multiprocessors(
    count: int, multiprocessors: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    multiprocessors(count)
    monkeypatch.setattr(attention, "plan", narrow)
    check(replace(LONG["mha"], sliding_window=150, batch=((1, 700), (0, 0), (1, 0), (2, 40))))


def test_more_query_heads_than_rows_of_a_block(configure: Configure) -> None:
    check(spanned("rep-20", (20, 1, 64), 1, 32, 1, 32, batch=((1, 45), (3, 60), (1, 1))))


@pytest.mark.parametrize("positions", [1024, 5, 40])
def test_rotation_table_with_magnitude(positions: int, configure: Configure) -> None:
    """YaRN's tables have a constant factor; short tables end within the first tile."""
    case = spanned("yarn", (4, 2, 64), 1, 32, 2, 32, batch=((1, min(positions, 90)), (2, 3)))
    inputs = build(case, BF16, DEVICE)
    inputs = inputs.change(cos_sin_cache=1.37 * inputs.layer.cos_sin_cache[:positions])
    got = cuda.bind(inputs.layer).attend(*inputs.call)
    assert_close_to_oracle(got, *expected_of(inputs, BF16), rows=len(inputs.q))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=attention_cases(HEAD_DIMS, max_queries=6, quantized=False),
    seed=st.integers(0, 99),
    early=st.integers(0, 1),
)
def test_random_cases(case: AttentionCase, seed: int, early: int, configure: Configure) -> None:
    configure(seed, early)
    check(case)
