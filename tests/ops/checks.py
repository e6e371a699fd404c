"""The float64 oracle of the test matrix, and the comparison that every fast version must pass."""

from __future__ import annotations

from functools import cache

import torch

from tests.ops.cases import AttentionCase, AttentionInputs, attend_in_torch, build
from tests.ops.rounding import allowed_attention_error


@cache
def expected(
    case: AttentionCase, dtype: torch.dtype
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """The oracle's ``(o_lat, lse)`` in float64, and the largest errors allowed on each."""
    return expected_of(build(case, dtype), dtype)


def expected_of(
    inputs: AttentionInputs, dtype: torch.dtype
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """The same for inputs of one's own."""
    oracle = attend_in_torch(inputs, torch.float64)
    allowed = allowed_attention_error(inputs, dtype)
    return oracle, (allowed.o_lat, allowed.lse)


def errors(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Absolute differences, element by element; infinities must agree, NaN never does."""
    a, b = a.cpu().double(), b.cpu().double()
    return torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(torch.inf)


def difference(a: torch.Tensor, b: torch.Tensor, rows: int) -> float:
    """Largest of the :func:`errors` in the first ``rows`` rows."""
    return float(errors(a[:rows], b[:rows]).max()) if rows else 0.0


def assert_matches_oracle(
    result: tuple[torch.Tensor, torch.Tensor], case: AttentionCase, dtype: torch.dtype
) -> None:
    """Compare a fast version's result for ``build(case, dtype)`` with the oracle."""
    rows = sum(queries for queries, _ in case.batch)
    assert_close_to_oracle(result, *expected(case, dtype), rows, str(case))


def assert_close_to_oracle(
    result: tuple[torch.Tensor, torch.Tensor],
    oracle: tuple[torch.Tensor, torch.Tensor],
    allowed: tuple[torch.Tensor, torch.Tensor],
    rows: int,
    what: str = "",
) -> None:
    """Compare the first ``rows`` rows of ``(o_lat, lse)``, element by element.

    The others are of no sequence: they must be cleared, as the oracle's are.
    """
    for name, got, want, limit in zip(("o_lat", "lse"), result, oracle, allowed, strict=True):
        assert got.dtype == torch.float32, f"{name}: expected float32, found {got.dtype}"
        assert got.shape == want.shape, f"{name}: expected {want.shape}, found {got.shape}"
        assert_within(got[:rows], want[:rows], limit[:rows], f"{what}: {name}")
        assert torch.equal(got[rows:].cpu(), want[rows:].float().cpu()), (
            f"{what}: padding of {name}"
        )


def assert_within(
    result: torch.Tensor, oracle: torch.Tensor, allowed: torch.Tensor, what: str
) -> None:
    """Compare element by element with what is allowed for each."""
    error = errors(result, oracle)
    if error.numel():
        worst = int((error / allowed).argmax())
        found, most = float(error.flatten()[worst]), float(allowed.flatten()[worst])
        assert found <= most, f"{what}: error {found:.3g}, allowed {most:.3g}"
