"""The expansion of low-frequency rotations: its bound, its limits, and that it is used."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from recalkv_vllm.ops.cpu import tables
from tests.ops.cases import AttentionCase, attend, attend_in_torch, build, spanned
from tests.ops.checks import assert_matches_oracle, difference


def table(
    rot_dim: int, base: float, positions: int, amplitude: float = 1.0, stretch: float = 1.0
) -> torch.Tensor:
    frequency = base ** (-torch.arange(0, rot_dim, 2).double() / rot_dim) / stretch
    angle = torch.arange(positions)[:, None] * frequency
    return (amplitude * torch.cat((angle.cos(), angle.sin()), dim=-1)).float()


def fitted(expansion: tables.Expansion) -> torch.Tensor:
    """``[tiles, 2, pairs, tile]``: cosines and sines of the expanded pairs."""
    by_tile = torch.einsum("smcp,mt->scpt", expansion.tile_coefficients, expansion.basis)
    functions = torch.einsum("jkm,mt->kjt", expansion.stretch_basis, expansion.basis)
    by_stretch = torch.einsum("skcp,kjt->sjcpt", expansion.stretch_coefficients, functions)
    by_stretch = by_stretch.flatten(0, 1)[: by_tile.shape[0]]
    pairs = expansion.tile_pairs, expansion.stretch_pairs
    for table, used in zip((by_tile, by_stretch), pairs, strict=True):
        assert used <= table.shape[2] < used + tables.PAIR_MULTIPLE
        assert not table[:, :, used:].any()
    return torch.cat((by_tile[:, :, : pairs[0]], by_stretch[:, :, : pairs[1]]), dim=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        (64, 1e4, 1000),
        (64, 1e4, 300),  # less than a stretch
        (128, 5e5, 20_000),
        (128, 1e4, 4096, 1.0, 8.0),  # linear scaling
        (128, 1e6, 4000, 1.3),  # YaRN scales the table
    ],
)
def test_reproduces_the_table(settings: tuple[Any, ...], dtype: torch.dtype) -> None:
    rounded = table(*settings).to(dtype)
    head_dim, _, positions = settings[:3]
    many, few = tables.expansions(rounded, head_dim)
    assert many.basis.shape[0] == 2 * few.basis.shape[0]
    assert 0 <= many.exact_pairs < few.exact_pairs < 0.5 * head_dim / 2
    for expansion in many, few:
        pairs = expansion.exact_pairs + expansion.tile_pairs + expansion.stretch_pairs
        assert pairs == head_dim // 2
        assert (expansion.stretch_pairs > 0) == (positions >= 512)
        exact = tables.by_chunk(table(*settings), expansion.basis.shape[1])
        exact = exact[:, :, expansion.exact_pairs :]
        # One for the expansion; a rounded table adds its rounding, twice that where it exceeds one.
        rounding = 0 if dtype == torch.float32 else 2 if rounded.max() > 1 else 1
        error = (fitted(expansion) - exact).abs().permute(0, 3, 1, 2).flatten(0, 1)
        assert error[:positions].max() <= (1 + 2.5 * rounding) * tables.EXPANSION_ERROR


def test_columns_without_rotation_are_expanded() -> None:
    many, few = tables.expansions(table(32, 1e4, 512), 64)
    assert many.exact_pairs < few.exact_pairs < 16


def test_rotations_that_are_all_fast() -> None:
    assert not tables.expansions(table(64, 1.1, 512), 64)


def test_a_table_shorter_than_a_tile() -> None:
    assert not tables.expansions(table(64, 1e4, 63), 64)


def test_a_layer_shares_the_tables_of_another() -> None:
    shared = table(64, 1e4, 512)
    assert tables.rope_tiles(shared) is tables.rope_tiles(shared)
    assert tables.expansions(shared, 64) is tables.expansions(shared, 64)


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
        # A query row per KV head; more columns than a task reads.
        spanned("mha", (24, 24, 64), 1, 32, 24, 32, batch=((1, 1024), (2, 700)), key_bias=True),
    ],
    ids=["plain", "bias", "interleaved", "partial", "table", "window", "smollm2", "mha"],
)
def test_expanded_scores(case: AttentionCase, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECALKV_CPU_ISA", isa)
    inputs = build(case, torch.bfloat16)
    expanded = attend(inputs)
    assert_matches_oracle(expanded, case, torch.bfloat16)
    monkeypatch.setattr(tables, "expansions", lambda *_: [])
    reconstructed = attend(inputs)
    rows = sum(queries for queries, _ in case.batch)
    # Had the expansion not been used, nothing would differ.
    assert 0 < difference(expanded[1], reconstructed[1], rows) < 0.05


def test_no_pair_is_left_to_reconstruct() -> None:
    slow = table(64, 1e4, 1024, stretch=40.0)
    assert all(expansion.exact_pairs == 0 for expansion in tables.expansions(slow, 64))
    case = spanned("slow", (8, 4, 64), 1, 32, 4, 32, batch=((1, 1000), (3, 70)), key_bias=True)
    inputs = build(case, torch.bfloat16).change(cos_sin_cache=slow)
    rows = sum(queries for queries, _ in case.batch)
    exact = attend_in_torch(inputs, torch.float64)
    for found, wanted in zip(attend(inputs), exact, strict=True):
        assert difference(found, wanted, rows) < 0.03
