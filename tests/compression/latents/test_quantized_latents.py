"""Quantized latents: rotation changes nothing, budgets hold, bands lose least."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recalkv_vllm.checkpoint import (
    AttentionGeometry,
    LatentLayout,
    RecalkvConfig,
    kv_bytes_per_token,
    rank_budget,
)
from recalkv_vllm.cli import main
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.latents.format_choice import (
    budget_of,
    chosen_latent_dtype,
    rank_compression,
)
from recalkv_vllm.compression.latents.rotation import (
    random_rotation,
    regions,
    rotate_latents,
    unit_blocks,
)
from recalkv_vllm.compression.latents.rounding_error import rounding_error
from recalkv_vllm.compression.layer import LayerFactors
from recalkv_vllm.latent_format import BITS, LatentFormat

GEOMETRY = AttentionGeometry(6, 96, 8, 4, 16)
FEW = ["--num-samples", "16", "--seq-len", "64"]
LAYOUTS = {
    "split": LatentLayout(96, 2, ((0, 32), (32, 64)), ((64, 96),), (0, 1, 2, 3)),
    "joint": LatentLayout(64, 2, ((0, 32), (32, 64)), ((0, 32), (32, 64)), (0, 1, 2, 3)),
    "nested": LatentLayout(64, 4, ((0, 16),), ((0, 64),), (0, 1, 2, 3)),
    "overlapping": LatentLayout(80, 4, ((0, 48),), ((32, 80),), (0, 1, 2, 3)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_rotated_factors_have_the_same_products(name: str) -> None:
    layout = LAYOUTS[name]
    shapes = layout.factor_shapes(GEOMETRY).values()
    factors = LayerFactors(layout, *(torch.randn(*s, dtype=torch.float64) for s in shapes))
    rotated = rotate_latents(factors)
    for before, after in zip(factors.products(), rotated.products(), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)  # float32
    assert rotated.layout == layout
    for start, end in regions(layout):
        part, turned = factors.down[start:end], rotated.down[start:end]
        torch.testing.assert_close(turned.T @ turned, part.T @ part, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(turned, part)


def test_rotation_spreads_a_latent_evenly() -> None:
    rotation = random_rotation(128)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(128, dtype=torch.float64))
    assert float(rotation.abs().max()) < 0.5
    assert random_rotation(128) is rotation
    uneven = torch.randn(4096, 64) * 2.0 ** -torch.arange(64)
    latent_format = LatentFormat("int4", 32)
    turned = uneven @ random_rotation(64).float()
    errors = [
        float((latent_format.round_trip(z) - z).square().sum() / z.square().sum())
        for z in (uneven, turned)
    ]
    assert errors[1] < errors[0]


def test_errors_of_formats() -> None:
    # A uniform quantizer with step D is off by D² / 12; 32 normal numbers reach 2.47 (RMS).
    for dtype in ("int4", "int3"):
        step = 2.47 / 2 ** (BITS[dtype] - 1)
        error = rounding_error(LatentFormat(dtype, 32))
        assert error == pytest.approx(step**2 / 12, rel=0.05)
    assert rounding_error(LatentFormat("int8", 32)) < rounding_error(LatentFormat("fp8", 32)) / 10


@given(st.floats(0, 0.97), st.sampled_from(["bf16", *BITS]))
def test_budget_of_bytes_is_never_exceeded(compression: float, latent_dtype: str) -> None:
    """Even if every rank ends inside a group of 32."""
    budget = budget_of(compression, GEOMETRY, latent_dtype)
    of_elements, latent_format = budget.compression, budget.latent_format
    if latent_format is not None:
        assert of_elements == rank_compression(compression, GEOMETRY, latent_format)
    assert 0 <= of_elements < 1
    elements = rank_budget(of_elements, GEOMETRY)
    each = elements // 6 // 32 * 32 - 16
    if each <= 0 or of_elements == 0:
        return
    layers = tuple(
        LatentLayout(rank, 4, ((0, rank),), ((0, rank),), (0, 1, 2, 3))
        for rank in [*([each] * 5), (elements - 5 * each) // 16 * 16]
    )
    config = RecalkvConfig("test", compression, layers, latent_quantization=latent_format)
    sizes = kv_bytes_per_token(config, GEOMETRY, 2)
    assert sizes["compressed"] <= (1 - compression) * sizes["dense"] + 1e-6
    assert sizes["compressed"] >= (1 - compression) * sizes["dense"] - 40


def test_names() -> None:
    assert chosen_latent_dtype("bf16", False, 0.5) == "bf16"
    assert chosen_latent_dtype("int4", False, 0.5) == "int4"
    assert chosen_latent_dtype("auto", True, 0.5) == "bands"
    assert chosen_latent_dtype("auto", True, 0.0) == "bf16"
    assert chosen_latent_dtype("auto", False, 0.5) == "bf16"
    with pytest.raises(InputError, match="--latent-dtype bands: only method kfac knows"):
        chosen_latent_dtype("bands", False, 0.5)
    with pytest.raises(InputError, match="--latent-dtype bands: expected a --compression above 0"):
        chosen_latent_dtype("bands", True, 0.0)
    with pytest.raises(InputError, match="--latent-dtype int2: expected one of"):
        chosen_latent_dtype("int2", True, 0.5)


BANDED = {
    "joint": LatentLayout(
        128, 2, ((0, 64), (64, 128)), ((0, 64), (64, 128)), (0, 1, 2, 3), ((32, 8), (32, 3)) * 2
    ),
    "nested": LatentLayout(
        96, 4, ((0, 32),), ((0, 96),), (0, 1, 2, 3), ((32, 6), (32, 6), (32, 2))
    ),
    "split": LatentLayout(
        128, 2, ((0, 32), (32, 64)), ((64, 128),), (0, 1, 2, 3), ((32, 4), (32, 4), (64, 2))
    ),
}


@pytest.mark.parametrize("name", BANDED)
def test_bands_are_rotated_and_scaled_block_by_block(name: str) -> None:
    layout = BANDED[name]
    layout.validate(GEOMETRY, name)
    shapes = layout.factor_shapes(GEOMETRY).values()
    factors = LayerFactors(layout, *(torch.randn(*s, dtype=torch.float64) for s in shapes))
    inputs = torch.randn(512, GEOMETRY.hidden_size, dtype=torch.float64) * 1e-3
    rotated = rotate_latents(factors)
    for start in range(0, layout.rank, 32):
        part, turned = factors.down[start : start + 32], rotated.down[start : start + 32]
        torch.testing.assert_close(turned.T @ turned, part.T @ part, rtol=1e-9, atol=1e-9)
    scaled = unit_blocks(rotated, inputs.T @ inputs / len(inputs))
    for before, after in zip(factors.products(), scaled.products(), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)  # float32
    mean_squares = (inputs @ scaled.down.T).square().mean(dim=0).unflatten(0, (-1, 32)).mean(dim=1)
    torch.testing.assert_close(mean_squares, torch.ones_like(mean_squares))


def compress(tiny: Path, out: Path, capsys: pytest.CaptureFixture, *args: str) -> dict:
    command = ["compress", str(tiny), "-o", str(out), *FEW, *args, "--json"]
    assert main(command) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("method", ["kfac", "palu"])
@pytest.mark.parametrize("dtype", ["int4", "fp8"])
def test_quantized_checkpoint_keeps_its_budget(tiny, tmp_path, capsys, method, dtype) -> None:
    arguments = ["--method", method, "--compression", "0.8", "--latent-dtype", dtype]
    made = compress(tiny, tmp_path / "out", capsys, *arguments)
    assert made["latent_quantization"] == {"dtype": dtype, "group_size": 32}
    size = made["kv_bytes_per_token"]
    assert 0.75 * 0.2 * size["dense"] < size["compressed"] <= 0.2 * size["dense"]
    assert made["compression"] >= 0.8


@pytest.mark.parametrize("compression", ["0.6", "0.75"])
def test_bands_lose_less_than_uniform_bits(tiny, tmp_path, capsys, compression) -> None:
    losses = {}
    for dtype in ("bf16", "int8", "int4", "int3", "auto"):
        out = tmp_path / dtype
        made = compress(tiny, out, capsys, "--compression", compression, "--latent-dtype", dtype)
        size = made["kv_bytes_per_token"]
        assert size["compressed"] <= (1 - float(compression)) * size["dense"] + 1e-6
        config = json.loads((out / "config.json").read_text())["recalkv"]
        loss = config["settings"]["expected_loss"]
        if loss is not None:  # few bits remove so much at full rank
            losses[dtype] = loss
    assert config["format_version"] == 2
    assert made["latent_quantization"] == {"dtype": "bands", "group_size": 32}
    assert {"bf16", "int8", "auto"} <= losses.keys()
    assert losses["auto"] == min(losses.values())


def test_format_that_needs_no_truncation_keeps_full_rank(tiny, tmp_path, capsys) -> None:
    made = compress(
        tiny, tmp_path / "out", capsys, "--compression", "0.3", "--latent-dtype", "int4"
    )
    geometry = replace(GEOMETRY, num_layers=2)
    assert sum(layer["rank"] for layer in made["layers"]) == 2 * geometry.dense_width
    assert made["compression"] == pytest.approx(1 - 4.5 / 16)
