"""Decode time on GPUs: what bounds it, and what it has to be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from recalkv_vllm.cost import GPUS, LayerCost, decode_seconds, dense_seconds, relative_decode_time
from recalkv_vllm.cost.gpu import gpu_times
from recalkv_vllm.cost.hopper import TILE, heads_per_block, hopper_spends

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
)
CODED = replace(JOINT, token_bytes=1024, code_bits=8)


@pytest.mark.parametrize(("layer", "budget"), [(JOINT, 1500), (CODED, 1900)])
def test_instruction_budgets_of_a_tile_of_one_head(layer: LayerCost, budget: int) -> None:
    spent = hopper_spends(layer, 90)
    assert spent is not None
    assert spent.instructions * TILE / layer.num_kv_heads == pytest.approx(budget)


@pytest.mark.parametrize(("layer", "most"), [(JOINT, 0.6), (CODED, 0.4)])
def test_what_the_budgets_are_for(layer: LayerCost, most: float) -> None:
    assert relative_decode_time([layer], GPUS["h100"]) <= most


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


def test_nested_groups_accumulate_values_once() -> None:
    """All heads of a group read one V span, in one block."""
    nested = replace(JOINT, k_group_size=4, v_group_size=4, k_width=128, v_width=512, shared=128)
    apart = replace(nested, v_group_size=1, shared=0)
    together, single = hopper_spends(nested, 90), hopper_spends(apart, 90)
    assert together is not None
    assert single is not None
    assert together.tensor_flop < single.tensor_flop
    assert heads_per_block(nested) == 4
    assert heads_per_block(replace(nested, k_width=192)) == 2  # 48 KiB for each head
    assert heads_per_block(replace(nested, k_width=1024)) == 0
    assert hopper_spends(replace(nested, k_width=1024), 90) is None
    assert hopper_spends(nested, 80) is None
    assert hopper_spends(replace(nested, head_dim=80), 90) is None
