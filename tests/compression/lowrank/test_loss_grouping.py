"""Grouping by what a group loses: planted copies are found, and no swap is better."""

import pytest
import torch

from recalkv_vllm.compression.layer import FisherFactors, LayerInputs
from recalkv_vllm.compression.lowrank.layer_metric import BOTH, KEYS, LayerMetric
from recalkv_vllm.compression.lowrank.loss_grouping import improve_grouping
from tests.compression.lowrank.test_grouping import HEAD_DIM, HIDDEN, partition, planted_heads


def layer(keys, values, heads, generator) -> LayerMetric:
    def metric(size):
        rows = torch.randn(2 * size, size, generator=generator, dtype=torch.float64)
        return rows.T @ rows / len(rows)

    fisher = FisherFactors(metric(HIDDEN), metric(2 * heads * HEAD_DIM))
    return LayerMetric(LayerInputs(0, keys, values, heads, fisher=fisher), HEAD_DIM)


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize(("groups", "size"), [(3, 3), (8, 4), (2, 2), (4, 2)])
def test_planted_copies_are_recovered_always(groups, size, noise):
    heads = groups * size
    for seed in range(3 if heads > 20 else 20):
        generator = torch.Generator().manual_seed(seed)
        keys, labels = planted_heads(groups, size, noise, generator)
        # Values follow their keys' grouping, by rotations of their own.
        values = torch.empty_like(keys)
        originals = torch.randn(groups, HEAD_DIM, HIDDEN, generator=generator, dtype=torch.float64)
        for head, label in enumerate(labels.tolist()):
            square = torch.randn(HEAD_DIM, HEAD_DIM, generator=generator, dtype=torch.float64)
            rotation, _ = torch.linalg.qr(square)
            values[head * HEAD_DIM : (head + 1) * HEAD_DIM] = rotation @ originals[label]
        metric = layer(keys, values, heads, generator)
        for which in (KEYS, BOTH):
            order = metric.head_order(size, 1 / size, which)
            found = sorted(sorted(order[i : i + size]) for i in range(0, heads, size))
            assert found == partition(labels), (seed, which)


def test_swaps_leave_no_better_swap():
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 6 * HEAD_DIM, HIDDEN, generator=generator, dtype=torch.float64)
    metric = layer(keys, values, 6, generator)
    calls = []

    def loss(group):
        calls.append(group)
        svd = metric.svd(group, BOTH)
        return float(svd.squares[8:].sum())

    groups = improve_grouping([[0, 1, 2], [3, 4, 5]], loss)
    assert len(calls) == len(set(calls))
    assert sorted(h for group in groups for h in group) == list(range(6))
    total = sum(loss(tuple(group)) for group in groups)
    first, second = groups
    for i in range(3):
        for j in range(3):
            swapped = [list(first), list(second)]
            swapped[0][i], swapped[1][j] = second[j], first[i]
            assert sum(loss(tuple(sorted(group))) for group in swapped) >= total * (1 - 1e-9)


@pytest.mark.parametrize("size", [1, 4])
def test_trivial_groupings_keep_the_order(size):
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 4 * HEAD_DIM, HIDDEN, generator=generator, dtype=torch.float64)
    assert layer(keys, values, 4, generator).head_order(size, 0.5, BOTH) == (0, 1, 2, 3)
