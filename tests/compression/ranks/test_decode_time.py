"""Predicted decode time of plans: limits of arithmetic and memory, and times that were measured."""

import numpy as np
import pytest

from recalkv_vllm.band_format import BLOCK_COLUMNS
from recalkv_vllm.benchmarks.geometries import GEOMETRIES
from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.layer import nested_layout, split_layout
from recalkv_vllm.compression.methods.banded_layer import banded_layer
from recalkv_vllm.compression.methods.base import MethodOptions
from recalkv_vllm.compression.methods.kfac_bands import KfacBands
from recalkv_vllm.compression.plan import Budget
from recalkv_vllm.compression.ranks.decode_time import LayerTimes, layer_cost, model_decode_time
from recalkv_vllm.compression.ranks.targets import Target, parse_target
from recalkv_vllm.compression.ranks.widths import falling_steps
from recalkv_vllm.cost import CPUS, GPUS, Cpu, decode_seconds, dense_seconds

LLAMA = AttentionGeometry(2, 4096, 32, 8, 128)


def split(removed: float, v_groups: int):
    """One K group per head of Llama-3.1-8B, and keys and values equally compressed."""
    kept = 1 - removed
    layout = split_layout(range(8), 1, v_groups, int(kept * 128), int(kept * 1024 / v_groups))
    return [layout] * 2


def predicted(layouts, device) -> float:
    return model_decode_time(layouts, lambda layer: None, LLAMA, device)


@pytest.mark.parametrize(
    ("removed", "v_groups", "measured"),
    [(0.5, 8, 1.06), (0.75, 8, 0.60), (0.5, 1, 1.30), (0.75, 1, 0.71)],
)
def test_times_on_a_cpu_are_those_of_the_docs(removed, v_groups, measured):
    """docs/performance.md, the attention kernel."""
    assert predicted(split(removed, v_groups), CPUS["cpu"]) == pytest.approx(measured, rel=0.1)


def test_without_the_cost_of_arithmetic_time_is_bytes():
    endless = Cpu(flop_per_s=1e18, bytes_per_s=1e10, stock_flop_per_byte=32)
    assert predicted(split(0.75, 8), endless) == pytest.approx(0.25)


def test_where_arithmetic_is_the_limit_bytes_do_not_matter():
    slow = Cpu(flop_per_s=1e9, bytes_per_s=1e10, stock_flop_per_byte=0.5)
    for v_width in (64, 80):
        flop = 2 * 64 * 8 * 128 + 2 * 32 * (128 + v_width)
        found = predicted([nested_layout(range(8), 1, 64, v_width)] * 2, slow)
        assert found == pytest.approx(flop / (0.5 * 4 * 8 * 128))


def test_a_split_layout_and_its_widths_take_the_same_time():
    for layouts, spans in (
        (split(0.5, 8), "split"),
        ([nested_layout(range(8), 2, 64, 96)], "nested"),
    ):
        (layout, *_), device = layouts, GPUS["h100"]
        cost = layer_cost(layout, None, LLAMA)
        times = LayerTimes(
            LLAMA, spans, layout.k_group_size, len(layout.v_spans), Target("h100"), False
        )
        expected = decode_seconds(cost, device) / dense_seconds(cost, device)
        found = times(layout.k_width, layout.v_width, cost.token_bytes, None)
        assert found == pytest.approx(expected)


def synthetic_layer(geometry: AttentionGeometry, size: int, decay: float, target: Target):
    """Ways to store a layer whose singular values fall exponentially, keys' a little faster."""
    groups, columns = geometry.num_kv_heads // size, 2 * size * geometry.head_dim
    values = np.exp(-np.arange(columns) / (decay * columns))
    times = LayerTimes(geometry, "nested", size, groups, target, True)
    joint = np.tile(values, (groups, 1))
    parts = {None: ([joint], 0.0)}
    for blocks in falling_steps(columns // 2 // BLOCK_COLUMNS):
        width = BLOCK_COLUMNS * blocks
        dropped = groups * float(np.square(values[width:]).sum()) / 2
        parts[width] = [joint[:, :width], joint[:, width:] / 2], dropped
    return banded_layer(tuple(range(geometry.num_kv_heads)), parts, (True, False), times)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_no_default_checkpoint_is_slow_on_an_h100(name):
    """Whatever spectra; of group sizes up to 4."""
    sizes = GEOMETRIES[name]
    geometry = AttentionGeometry(3, 4096, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim)
    target = parse_target("h100")
    method = KfacBands(geometry, MethodOptions(target=target))
    divisors = [n for n in (1, 2, 3, 4) if geometry.num_kv_heads % n == 0]
    measured = {
        size: [synthetic_layer(geometry, size, decay, target) for decay in (0.1, 0.2, 0.4)]
        for size in divisors
    }
    for removed in (0.5, 0.75, 0.86):
        time = method.decode_time(method.plan(measured, Budget(removed)))
        assert time <= target.limit_at(removed, coded=True)
