"""The CUDA decode kernel for Hopper, emulated, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recalkv_vllm.ops.cuda import extension, hopper
from recalkv_vllm.ops.cuda.hopper import HopperAttention, HopperPlan
from recalkv_vllm.ops.cuda.plan import HEAD_DIMS
from recalkv_vllm.span import Span
from tests.ops.band_cases import BAND_CASES, banded
from tests.ops.cases import CASES, MIXED, AttentionCase, AttentionInputs, build, joint, spanned
from tests.ops.checks import assert_close_to_oracle, assert_matches_oracle, expected_of
from tests.ops.strategies import attention_cases

Configure = Callable[[int, int], None]
#: Two tiles of 1,024 columns do not fit a multiprocessor's shared memory.
TOO_WIDE = "rank-1024"
SUPPORTED = [case for case in CASES if case.head_dim in HEAD_DIMS and case.name != TOO_WIDE]
#: Blocks that the kernel takes in another order than columns have.
UNSORTED = (
    banded(
        joint("bands-ascending", (4, 2, 64), 1, 96, batch=MIXED),
        *[((32, 2), (32, 4), (32, 6))] * 2,
    ),
    banded(
        AttentionCase(
            "bands-k-after-v",
            rank=128,
            num_heads=2,
            num_kv_heads=1,
            k_spans=(Span(64, 128),),
            v_spans=(Span(0, 96),),
            batch=MIXED,
        ),
        ((32, 3), (32, 8), (32, 2), (32, 4)),
    ),
)
BANDS = [c for c in BAND_CASES if c.head_dim in HEAD_DIMS and c.name != "bands-rank-1024"]
BANDS += UNSORTED
BF16 = torch.bfloat16
#: The whole matrix in float16 is for the long run; slow pairs are tried in both.
DTYPES = [BF16, pytest.param(torch.float16, marks=pytest.mark.slow)]

ON_GPU = torch.cuda.is_available() and extension.load_error is None
DEVICE = "cuda" if ON_GPU else "cpu"

pytestmark = pytest.mark.skipif(
    ON_GPU and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def run(inputs: AttentionInputs) -> tuple[HopperAttention, tuple[torch.Tensor, torch.Tensor]]:
    """Bind and call, into memory that starts as NaN."""
    layer = HopperAttention(inputs.layer)
    tokens, heads, _ = inputs.q.shape
    result = (
        torch.full((tokens, heads, inputs.layer.v_width), torch.nan, device=DEVICE),
        torch.full((tokens, heads), torch.nan, device=DEVICE),
    )
    layer.run(*inputs.call, *result)
    return layer, result


def check(case: AttentionCase, dtype: torch.dtype = BF16) -> HopperAttention:
    layer, result = run(build(case, dtype, DEVICE))
    assert_matches_oracle(result, case, dtype)
    return layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SUPPORTED, ids=str)
def test_matrix(case: AttentionCase, dtype: torch.dtype, configure: Configure) -> None:
    check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", BANDS, ids=str)
def test_bands(case: AttentionCase, dtype: torch.dtype, configure: Configure) -> None:
    check(case, dtype)


def test_nan_of_a_model_reaches_the_output(configure: Configure) -> None:
    """A scale that is no number must not become a plausible one."""
    inputs = build(next(case for case in BANDS if case.name == "bands-4"), BF16, DEVICE)
    _, scales = inputs.layer.latent_format.split_cache(inputs.kv_cache)
    scales[inputs.batch.block_table[-1, 0], 0, 0] = 0xFF
    o_lat = run(inputs)[1][0]
    assert o_lat[-1, :2].isnan().all()
    assert not o_lat[-1, 2:].isnan().any()


@pytest.mark.parametrize("scale", [0xF7, 0x30, 0x01], ids=hex)
def test_elements_of_any_scale(scale: int, configure: Configure) -> None:
    """Float16 has room for the largest elements, and small ones are rounded by 2^-15 at most.

    The scales are 61440, 2^-9 and 2^-17, of blocks that are values alone.
    """
    case = banded(
        AttentionCase(
            "bands-scales",
            rank=192,
            num_heads=2,
            num_kv_heads=1,
            k_spans=(Span(0, 32),),
            v_spans=(Span(32, 192),),
            batch=MIXED,
        ),
        ((32, 4), (32, 8), (32, 6), (32, 4), (32, 3), (32, 2)),
    )
    inputs = build(case, BF16, DEVICE)
    inputs.layer.latent_format.split_cache(inputs.kv_cache)[1][..., 1:] = scale
    oracle, (allowed, allowed_lse) = expected_of(inputs, BF16)
    got = run(inputs)[1]
    assert_close_to_oracle(got, oracle, (allowed + 2.0**-15, allowed_lse), rows=len(inputs.q))


def test_keys_beyond_float16_saturate(configure: Configure) -> None:
    inputs = build(LONG["gqa"], BF16, DEVICE)
    o_lat, lse = run(inputs.change(k_up=inputs.layer.k_up * 2.0**24))[1]
    assert o_lat.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.parametrize("case", [*SUPPORTED, *BANDS], ids=str)
def test_matrix_with_early_copies_on_one_multiprocessor(
    case: AttentionCase, configure: Configure, multiprocessors: Callable[[int], None]
) -> None:
    configure(1, 1)
    multiprocessors(1)
    check(case)


LONG = {
    "gqa": spanned("long", (8, 2, 128), 1, 48, 1, 80, batch=((1, 611), (3, 290), (1, 64))),
    "mha": spanned("long-mha", (2, 2, 64), 1, 32, 2, 32, batch=((1, 700), (2, 333))),
    "joint": joint("long-joint", (6, 3, 64), 3, 96, batch=((1, 511), (4, 512)), key_norm=True),
    "bands": banded(
        joint("long-bands", (4, 2, 64), 1, 64, batch=((1, 700), (1, 333))),
        *[((32, 6), (32, 4))] * 2,
    ),
}


@pytest.mark.parametrize("early", [0, 1])
@pytest.mark.parametrize("stages", [2, 4, 6])
@pytest.mark.parametrize("name", LONG)
def test_long_streams_of_tiles(
    name: str,
    stages: int,
    early: int,
    configure: Configure,
    multiprocessors: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rings go round many times, and the result does not depend on who comes first."""
    monkeypatch.setattr(hopper, "MOST_STAGES", stages)
    multiprocessors(1)
    configure(0, early)
    case = LONG[name]
    layer = check(case)
    # In bands, tiles are taken in twos, by one warpgroup if the ring has no more.
    few = name == "bands" and stages == 2
    expected = (1 if few else 2, min(stages, 4) if name == "bands" else stages)
    assert {(plan.teams, plan.stages) for plan, _ in layer.plans.values()} == {expected}
    first = run(build(case, BF16, DEVICE))[1]
    configure(5, early)
    again = run(build(case, BF16, DEVICE))[1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("v_width", [80, 240, 272])
@pytest.mark.parametrize("tiles", [1, 2])
def test_every_instantiation(
    tiles: int,
    v_width: int,
    head_dim: int,
    lean: bool,
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = ((1, 70), (5, 33), (0, 0), (1, 0))
    case = spanned(
        f"{tiles}-{v_width}",
        (6, 2, head_dim),
        2,
        48,
        1,
        v_width,
        overlap=16,
        batch=batch,
        key_bias=not lean,
        rot_dim=16 if lean else None,
    )

    def chosen(*arguments: object) -> HopperPlan | None:
        return hopper_plan(*arguments[:2], tiles, *arguments[3:])

    hopper_plan = hopper.hopper_plan
    monkeypatch.setattr(hopper, "hopper_plan", chosen)
    for dtype in (BF16, torch.float16):
        layer = check(case, dtype)
        assert layer.packed.lean == lean


@pytest.mark.parametrize("count", [1, 3, 40])
def test_any_number_of_multiprocessors(count: int, multiprocessors: Callable[[int], None]) -> None:
    multiprocessors(count)
    check(replace(LONG["mha"], sliding_window=150, batch=((1, 700), (0, 0), (1, 0), (2, 40))))


def llama_table(positions: int, head_dim: int, theta: float = 5e5) -> torch.Tensor:
    frequency = theta ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    angle = torch.arange(positions).double()[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("theta", [5e5, 1e6, 1e9])
@pytest.mark.parametrize("magnitude", [1.0, 1.37])
def test_slow_pairs(
    magnitude: float, theta: float, dtype: torch.dtype, configure: Configure
) -> None:
    """Tables of models, most of whose pairs turn little within a tile; YaRN's have a magnitude."""
    case = joint("slow", (8, 2, 128), 1, 96, batch=((1, 700), (3, 130), (1, 5)))
    inputs = build(case, dtype, DEVICE)
    table = magnitude * llama_table(1024, 128, theta).to(DEVICE)
    inputs = inputs.change(cos_sin_cache=table)
    layer, got = run(inputs)
    assert layer.packed.lean == (dtype == BF16 or theta == 1e9)
    assert_close_to_oracle(got, *expected_of(inputs, dtype), rows=len(inputs.q))


@pytest.mark.parametrize("positions", [1024, 5, 40])
def test_rotation_table_with_magnitude(positions: int, configure: Configure) -> None:
    """YaRN's tables have a constant factor; short tables end within the first tile."""
    case = spanned("yarn", (4, 2, 64), 1, 32, 2, 32, batch=((1, min(positions, 90)), (2, 3)))
    inputs = build(case, BF16, DEVICE)
    inputs = inputs.change(cos_sin_cache=1.37 * inputs.layer.cos_sin_cache[:positions])
    got = run(inputs)[1]
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
