"""The expansion of low-frequency rotations: its bound, its limits, and that it is used."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from recalkv_vllm.ops.cpu import tables
from tests.ops.cases import AttentionCase, attend, build, spanned
from tests.ops.checks import assert_matches_oracle, difference


def table(
    rot_dim: int, base: float, positions: int, amplitude: float = 1.0, stretch: float = 1.0
) -> torch.Tensor:
    frequency = base ** (-torch.arange(0, rot_dim, 2).double() / rot_dim) / stretch
    angle = torch.arange(positions)[:, None] * frequency
    return (amplitude * torch.cat((angle.cos(), angle.sin()), dim=-1)).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        (64, 1e4, 1000),
        (128, 5e5, 20_000),
        (128, 1e4, 4096, 1.0, 8.0),  # linear scaling
        (128, 1e6, 4000, 1.3),  # YaRN scales the table
    ],
)
def test_reproduces_the_table(settings: tuple[Any, ...], dtype: torch.dtype) -> None:
    rounded = table(*settings).to(dtype)
    head_dim = settings[0]
    expansion = tables.expansion(rounded, head_dim)
    assert expansion is not None
    assert 0 < expansion.exact_pairs < 0.6 * head_dim / 2
    exact = tables.by_chunk(table(*settings), expansion.basis.shape[1])
    exact = exact[:, :, expansion.exact_pairs :]
    coefficients = expansion.coefficients[..., : exact.shape[2]]
    fitted = torch.einsum("smcp,mt->scpt", coefficients, expansion.basis)
    # One for the expansion; a rounded table adds its rounding, twice that where it exceeds one.
    rounding = 0 if dtype == torch.float32 else 2 if rounded.max() > 1 else 1
    error = (fitted - exact).abs().transpose(2, 3).transpose(1, 2).flatten(0, 1)
    assert error[: settings[2]].max() <= (1 + 2.5 * rounding) * tables.EXPANSION_ERROR
    assert not expansion.coefficients[..., exact.shape[2] :].any()


def test_columns_without_rotation_are_expanded() -> None:
    expansion = tables.expansion(table(32, 1e4, 512), 64)
    assert expansion is not None
    assert expansion.exact_pairs < 16


def test_rotations_that_are_all_fast() -> None:
    assert tables.expansion(table(64, 1.1, 512), 64) is None


def test_a_layer_shares_the_tables_of_another() -> None:
    shared = table(64, 1e4, 512)
    assert tables.rope_tiles(shared) is tables.rope_tiles(shared)
    assert tables.expansion(shared, 64) is tables.expansion(shared, 64)


LONG = spanned("long", (8, 2, 128), 1, 64, 2, 64, batch=((1, 901), (1, 130), (2, 257), (1, 64)))


@pytest.mark.parametrize("isa", torch.ops.recalkv_cpu.instruction_sets(torch.bfloat16))
@pytest.mark.parametrize(
    "case",
    [
        LONG,
        replace(LONG, key_bias=True),
        replace(LONG, is_neox=False),
        replace(LONG, rot_dim=64),
        replace(LONG, cos_sin_dtype=torch.bfloat16),
        replace(LONG, sliding_window=100),
        spanned("smollm2", (9, 3, 64), 3, 96, 1, 96, batch=((1, 400), (1, 65))),
    ],
    ids=["plain", "bias", "interleaved", "partial", "table", "window", "smollm2"],
)
def test_expanded_scores(case: AttentionCase, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECALKV_CPU_ISA", isa)
    inputs = build(case, torch.bfloat16)
    expanded = attend(inputs)
    assert_matches_oracle(expanded, case, torch.bfloat16)
    monkeypatch.setattr(tables, "expansion", lambda *_: None)
    reconstructed = attend(inputs)
    rows = sum(queries for queries, _ in case.batch)
    # Had the expansion not been used, nothing would differ.
    assert 0 < difference(expanded[1], reconstructed[1], rows) < 0.05
