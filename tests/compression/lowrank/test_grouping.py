"""Head grouping: planted copies are found, and no other partition is better."""

import numpy as np
import pytest
import torch

from recalkv_vllm.compression.lowrank.grouping import group_heads, head_similarity

HEAD_DIM, HIDDEN = 8, 64


def planted_heads(groups: int, size: int, noise: float, generator: torch.Generator):
    """Weights whose heads are rotated, scaled, noisy copies of ``groups`` originals, shuffled."""
    labels = torch.arange(groups).repeat_interleave(size)[
        torch.randperm(groups * size, generator=generator)
    ]
    originals = torch.randn(groups, HEAD_DIM, HIDDEN, generator=generator, dtype=torch.float64)
    heads = []
    for label in labels.tolist():
        square = torch.randn(HEAD_DIM, HEAD_DIM, generator=generator, dtype=torch.float64)
        rotation, _ = torch.linalg.qr(square)
        scale = 0.5 + torch.rand((), generator=generator, dtype=torch.float64)
        copy = scale * rotation @ originals[label]
        error = torch.randn(HEAD_DIM, HIDDEN, generator=generator, dtype=torch.float64)
        heads.append(copy + noise * error)
    return torch.cat(heads), labels


def partition(labels: torch.Tensor) -> list[list[int]]:
    return sorted(torch.nonzero(labels == g).flatten().tolist() for g in labels.unique())


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize(
    ("groups", "size"), [(3, 3), (4, 2), (2, 4), (8, 2), (8, 4), (4, 8), (16, 2), (5, 3)]
)
def test_planted_copies_are_recovered_always(groups, size, noise):
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        weight, labels = planted_heads(groups, size, noise, generator)
        x = torch.randn(500, HIDDEN, generator=generator, dtype=torch.float64)
        similarity = head_similarity(weight, x.T @ x / 500, x.mean(0), groups * size)
        assert group_heads(similarity, size) == partition(labels)


def test_swaps_leave_no_better_swap():
    """Beyond the exact search: 16 heads in groups of 4 with random similarities."""
    rng = np.random.default_rng(0)
    a = rng.random((16, 16))
    similarity = (a + a.T) / 2

    def total(groups):
        return sum(similarity[np.ix_(g, g)].sum() for g in groups)

    groups = group_heads(similarity, 4)
    assert sorted(head for group in groups for head in group) == list(range(16))
    for first in range(4):
        for second in range(first):
            for i in range(4):
                for j in range(4):
                    swapped = [list(g) for g in groups]
                    swapped[first][i], swapped[second][j] = groups[second][j], groups[first][i]
                    assert total(swapped) <= total(groups) + 1e-9


@pytest.mark.parametrize(("heads", "size"), [(4, 1), (4, 4), (1, 1)])
def test_trivial_groupings_keep_the_order(heads, size):
    similarity = np.random.default_rng(0).random((heads, heads))
    assert [head for group in group_heads(similarity, size) for head in group] == list(range(heads))


def test_similarity_is_centered_kernel_alignment():
    """The textbook definition on token rows, with centered Gram matrices."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3 * HEAD_DIM, HIDDEN, generator=generator, dtype=torch.float64)
    x = 2 + torch.randn(100, HIDDEN, generator=generator, dtype=torch.float64)
    outputs = [x @ w.T for w in weight.chunk(3)]
    centered = [o - o.mean(0) for o in outputs]

    def hsic(a, b):
        return torch.trace(a @ a.T @ b @ b.T)

    expected = [
        [float(hsic(a, b) / (hsic(a, a) * hsic(b, b)).sqrt()) for b in centered] for a in centered
    ]
    similarity = head_similarity(weight, x.T @ x / 100, x.mean(0), 3)
    np.testing.assert_allclose(similarity, expected, rtol=1e-9)
