"""Head-wise similarity-aware reordering (ReCalKV, section 3.2): which KV heads share a group."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

Grouping = list[list[int]]

#: Up to this many partitions are searched in full.
EXACT_PARTITIONS = 20_000
RANDOM_STARTS = 16


def head_similarity(
    weight: torch.Tensor, second_moment: torch.Tensor, mean: torch.Tensor, num_heads: int
) -> np.ndarray:
    """Linear CKA between the outputs of heads, from the moments of their common input.

    ``CKA(i, j) = ‖C_ij‖_F² / (‖C_ii‖_F ‖C_jj‖_F)`` with ``C_ij = W_i (A - μ μᵀ) W_jᵀ``, the
    cross-covariance of the heads' outputs. It is 1 for heads equal up to rotation and scale.

    Args:
        weight: ``[heads · d, H]``.
        second_moment: ``A: [H, H]``.
        mean: ``μ: [H]``.
        num_heads: heads in ``weight``.

    Returns:
        ``[heads, heads]``, symmetric, values in [0, 1].
    """
    return block_alignment(weight @ (second_moment - torch.outer(mean, mean)) @ weight.T, num_heads)


def block_alignment(covariance: torch.Tensor, num_heads: int) -> np.ndarray:
    """``‖C_ij‖_F² / (‖C_ii‖_F ‖C_jj‖_F)`` of the blocks of ``C: [heads · n, heads · n]``."""
    blocks = covariance.unflatten(0, (num_heads, -1)).unflatten(2, (num_heads, -1))
    alignment = blocks.square().sum(dim=(1, 3))
    norms = alignment.diagonal().sqrt()
    return (alignment / torch.outer(norms, norms)).numpy()


def group_heads(similarity: np.ndarray, group_size: int) -> Grouping:
    """Partition heads into groups of ``group_size`` with the largest total similarity inside.

    Small problems are searched in full; larger ones by swaps of two heads until no swap helps,
    from a greedy start and from random ones (a fixed seed), keeping the best. Growing one group
    after the other without swaps, as in the paper's code, loses copies of heads for groups of
    three and more.

    Returns:
        Groups in the order of their first head, heads ascending inside each.
    """
    heads = len(similarity)
    if group_size == 1:
        return [[h] for h in range(heads)]
    if _num_partitions(heads, group_size) <= EXACT_PARTITIONS:
        candidates: Iterator[Grouping] = _partitions(tuple(range(heads)), group_size)
    else:
        candidates = (_improve(g, similarity) for g in _starts(similarity, group_size))
    best = max(candidates, key=lambda grouping: _total(grouping, similarity))
    return sorted(sorted(group) for group in best)


def _total(grouping: Grouping, similarity: np.ndarray) -> float:
    return sum(float(similarity[np.ix_(group, group)].sum()) for group in grouping)


def _num_partitions(heads: int, group_size: int) -> int:
    groups = heads // group_size
    return math.factorial(heads) // (math.factorial(group_size) ** groups * math.factorial(groups))


def _partitions(heads: Sequence[int], group_size: int) -> Iterator[Grouping]:
    if not heads:
        yield []
        return
    first, rest = heads[0], heads[1:]
    for others in itertools.combinations(rest, group_size - 1):
        left = tuple(h for h in rest if h not in others)
        for partition in _partitions(left, group_size):
            yield [[first, *others], *partition]


def _starts(similarity: np.ndarray, group_size: int) -> Iterator[Grouping]:
    yield _greedy(similarity, group_size)
    generator = np.random.default_rng(0)
    for _ in range(RANDOM_STARTS):
        yield generator.permutation(len(similarity)).reshape(-1, group_size).tolist()


def _greedy(similarity: np.ndarray, group_size: int) -> Grouping:
    """Seed each group with the most similar pair left, grow it by the head most similar to it."""
    left = set(range(len(similarity)))
    groups = []
    while left:
        pairs = itertools.combinations(sorted(left), 2)
        most_similar = max(pairs, key=lambda pair: similarity[pair])
        group = list(most_similar)
        left -= set(group)
        while len(group) < group_size:
            best = max(sorted(left), key=lambda h: similarity[h, group].sum())
            group.append(best)
            left.remove(best)
        groups.append(group)
    return groups


def _improve(grouping: Grouping, similarity: np.ndarray) -> Grouping:
    """Make the best swap of two heads of different groups, as long as one helps."""
    groups = np.array(grouping)
    group_of = np.empty(len(similarity), dtype=int)
    group_of[groups] = np.arange(len(groups))[:, None]
    own = np.diagonal(similarity)
    while True:
        to_group = similarity[:, groups].sum(axis=2)  # of each head to the members of each group
        to_own = to_group[np.arange(len(similarity)), group_of] - own
        joined = to_group[:, group_of] - similarity  # of head i to the group of j without j
        gain = joined + joined.T - to_own[:, None] - to_own
        gain[group_of[:, None] == group_of] = 0
        i, j = np.unravel_index(gain.argmax(), gain.shape)
        if gain[i, j] < 1e-9:  # rounding must not swap back and forth for ever
            return groups.tolist()
        group_of[i], group_of[j] = group_of[j], group_of[i]
        groups = np.argsort(group_of, kind="stable").reshape(groups.shape)
