"""Decode time on GPUs: what bounds it, and what it has to be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from recalkv_vllm.band_format import Band, BandFormat, token_bytes
from recalkv_vllm.cost import GPUS, LayerCost, decode_seconds, dense_seconds, relative_decode_time
from recalkv_vllm.cost.gpu import fastest_kernel, gpu_times
from recalkv_vllm.cost.hopper import (
    SHARED_BYTES,
    TILE,
    TOLERANCE,
    consumer_groups,
    hopper_spends,
)
from recalkv_vllm.ops.cuda.hopper import hopper_plan, value_tiles
from recalkv_vllm.ops.cuda.hopper_bands import band_tables
from recalkv_vllm.ops.cuda.shapes import LayerShape, Limits
from recalkv_vllm.span import Span

#: One head per group of Llama-3.1-8B: joint spans at 50 % in 16 bits, and at 75 % in codes.
JOINT = LayerCost(
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    k_group_size=1,
    v_group_size=1,
    k_width=128,
    v_width=128,
    shared=128,
    token_bytes=2048,
    code_bits=None,
    bands=False,
)
CODED = replace(JOINT, token_bytes=1024, code_bits=8, bands=True)


@pytest.mark.parametrize(
    ("layer", "instructions", "time"),
    # docs/kernels/cuda_decode.md: joint at 50 % in elements, and at 76 % in bands.
    [(JOINT, 1203, 0.50), (CODED, 1885, 0.33)],
    ids=["elements", "bands"],
)
def test_layouts_of_the_docs(layer: LayerCost, instructions: int, time: float) -> None:
    spent = hopper_spends(layer, 90)
    assert spent is not None
    counted = spent.instructions * TILE / layer.num_kv_heads
    assert counted == pytest.approx(instructions, rel=TOLERANCE)
    assert relative_decode_time([layer], GPUS["h100"]) == pytest.approx(time, rel=TOLERANCE)


@pytest.mark.parametrize("name", GPUS)
def test_the_slowest_of_four_things_decides(name: str) -> None:
    gpu = GPUS[name]
    for times in gpu_times(JOINT, gpu):
        assert times.slowest == max(times.memory, times.tensor, times.shared, times.issue)
    faster = replace(gpu, tensor_flop_per_s=1e30, clock=1e15)
    bytes_alone = relative_decode_time([JOINT], faster)
    factors = JOINT.factor_bytes / (8 * 32768 * 4096)
    assert bytes_alone == pytest.approx(0.5 + factors)
    assert bytes_alone <= relative_decode_time([JOINT], gpu)


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("layer", [JOINT, CODED], ids=["elements", "codes"])
def test_more_of_anything_takes_no_less_time(name: str, layer: LayerCost) -> None:
    gpu = GPUS[name]
    time = decode_seconds(layer, gpu)
    wider = replace(layer, k_width=256, v_width=256, shared=256)
    assert decode_seconds(wider, gpu) >= time
    assert decode_seconds(replace(layer, token_bytes=4 * layer.token_bytes), gpu) >= time
    assert decode_seconds(replace(wider, k_group_size=2, v_group_size=2), gpu) > 0
    assert dense_seconds(layer, gpu) == pytest.approx(32768 * 8 * 4096 / (0.87 * gpu.bytes_per_s))


def test_every_head_has_blocks_of_its_own_on_hopper() -> None:
    """Groups of several heads take as much as single heads with the same spans, but for bytes."""
    several = replace(CODED, k_group_size=4, v_group_size=4, token_bytes=256)
    one, four = hopper_spends(CODED, 90), hopper_spends(several, 90)
    assert one is not None
    assert four is not None
    assert four.instructions == one.instructions
    assert four.tensor_flop == one.tensor_flop
    wide = replace(CODED, v_width=512)
    spent = hopper_spends(wide, 90)
    assert spent is not None
    assert spent.tensor_flop > 2 * one.tensor_flop  # keys once for every 256 columns
    four_queries = hopper_spends(replace(CODED, queries=4), 90)
    assert four_queries is not None
    assert 2 * one.instructions < four_queries.instructions < 4 * one.instructions


@pytest.mark.parametrize(
    "other",
    [
        {"head_dim": 80},
        {"k_width": 1024},
        {"bands": False},
        {"code_bits": None, "bands": False, "k_group_size": 2},
    ],
    ids=str,
)
def test_layers_that_the_kernel_for_hopper_does_not_decode(other: dict[str, Any]) -> None:
    assert hopper_spends(CODED, 90) is not None
    assert hopper_spends(CODED, 80) is None
    layer = replace(CODED, **other)
    assert hopper_spends(layer, 90) is None
    assert fastest_kernel(layer, GPUS["h100"]) in ("triton", None)


@pytest.mark.parametrize("k_width", range(64, 577, 64))
@pytest.mark.parametrize("v_width", [64, 256, 512])
@pytest.mark.parametrize("coded", [False, True], ids=["elements", "codes"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_layers_that_fit_are_those_that_have_a_plan(
    head_dim: int, coded: bool, v_width: int, k_width: int
) -> None:
    rank = max(k_width, v_width)
    bands = BandFormat((Band(rank, 6),)) if coded else None
    layer = replace(
        CODED if coded else JOINT,
        head_dim=head_dim,
        num_heads=4,
        num_kv_heads=1,
        k_width=k_width,
        v_width=v_width,
        shared=min(k_width, v_width),
        token_bytes=token_bytes(bands, rank, 2),
    )
    shape = LayerShape(head_dim, 1, (Span(0, k_width),), (Span(0, v_width),), False)
    tables = band_tables(shape, bands, value_tiles(shape)) if bands else None
    planned = hopper_plan(shape, Limits(132, SHARED_BYTES, 228 << 10), 1, True, tables)
    assert (hopper_spends(layer, 90) is not None) == (planned is not None)
    assert consumer_groups(layer) == (planned.teams if planned else 0)
