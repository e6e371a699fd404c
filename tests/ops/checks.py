"""The float64 oracle of the test matrix and the tolerance that every fast version must meet."""

from __future__ import annotations

from functools import cache

import torch

from recalkv_vllm.ops import reference
from tests.ops.cases import AttentionCase, build

#: A fast version may err this many times as much as plain torch in the same precision,
ERROR_RATIO = 2.0
#: and by this much more, absolutely: for outputs of order one, a few units in the last place of
#: the results (float32) or of the keys and probabilities (low precision).
ERROR_FLOOR = {torch.float32: 4e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@cache
def expected(
    case: AttentionCase, dtype: torch.dtype
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[float, float]]:
    """The oracle's ``(o_lat, lse)`` in float64 and the largest errors allowed on each."""
    inputs = build(case, dtype)
    oracle = reference.paged_latent_attention(**inputs.arguments, compute_dtype=torch.float64)
    plain = reference.paged_latent_attention(**inputs.arguments, compute_dtype=dtype)
    rows = int(inputs.query_start_loc[-1])
    errors = [difference(a, b, rows) for a, b in zip(plain, oracle, strict=True)]
    allowed = [ERROR_RATIO * error + ERROR_FLOOR[dtype] for error in errors]
    return oracle, (allowed[0], allowed[1])


def difference(a: torch.Tensor, b: torch.Tensor, rows: int) -> float:
    """Largest difference in the first ``rows`` rows; infinities must agree, NaN never does."""
    a, b = a[:rows].cpu().double(), b[:rows].cpu().double()
    if a.numel() == 0:
        return 0.0
    return float(torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(torch.inf).max())


def assert_matches_oracle(
    result: tuple[torch.Tensor, torch.Tensor], case: AttentionCase, dtype: torch.dtype
) -> None:
    """Compare a fast version's result for ``build(case, dtype)`` with the oracle."""
    oracle, allowed = expected(case, dtype)
    rows = sum(queries for queries, _ in case.batch)
    for name, got, want, limit in zip(("o_lat", "lse"), result, oracle, allowed, strict=True):
        assert got.dtype == torch.float32, f"{name}: expected float32, found {got.dtype}"
        assert got.shape == want.shape, f"{name}: expected {want.shape}, found {got.shape}"
        error = difference(got, want, rows)
        assert error <= limit, f"{case}: {name}: error {error:.3g}, allowed {limit:.3g}"
