"""The work list of a step, cut in Triton's interpreter, against plain Python."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recalkv_vllm.benchmarks.makespan import cut_tiles
from recalkv_vllm.kernels.pieces import MAX_PIECES, Bounds, piece_bounds
from recalkv_vllm.ops import Batch
from recalkv_vllm.ops.triton.work_list import Cut, WorkList, work_list

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: ``(queries, cached tokens)`` of each sequence.
Lengths = list[tuple[int, int]]


def batch_of(lengths: Lengths, before: int = 0, **hints: Any) -> Batch:
    """Sequences behind ``before`` rows of others."""
    starts = list(accumulate((queries for queries, _ in lengths), initial=before))
    query_start_loc = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    seq_lens = torch.tensor([n for _, n in lengths], dtype=torch.int32, device=DEVICE)
    return Batch(seq_lens[:, None], seq_lens, query_start_loc, **hints)


def cut(lengths: Lengths, how: Cut, before: int = 0, padding: int = 0) -> WorkList:
    batch = batch_of(lengths, before)
    rows = sum(queries for queries, _ in lengths) + padding
    work, launches = work_list(batch, range(len(lengths)), range(before, before + rows), how)
    for launch in launches:
        launch.run()
    return work


def tiles_of(lengths: Lengths, how: Cut) -> list[tuple[int, int, range]]:
    """``(sequence, first row, tiles)`` of every row block that sees a token."""
    blocks = []
    for seq, (queries, length) in enumerate(lengths):
        for begin in range(0, queries * how.per_kv, how.rows):
            last = min(begin + how.rows, queries * how.per_kv) - 1
            seen: set[int] = set()
            for query in {begin // how.per_kv, last // how.per_kv}:
                position = length - queries + query
                oldest = max(position - how.window + 1, 0) if how.window else 0
                seen |= {t // how.tile for t in (oldest, position) if position >= 0}
            if seen:
                blocks.append((seq, begin, range(min(seen), max(seen) + 1)))
    return blocks


def check(lengths: Lengths, how: Cut, before: int = 0, padding: int = 0) -> None:
    work = cut(lengths, how, before, padding)
    pieces, first_piece = work.pieces.tolist(), work.first_piece.tolist()
    used = first_piece[-1]
    assert used <= how.bounds.capacity == len(pieces)
    assert first_piece == sorted(first_piece)
    assert all(piece == [0, 0, 0, 0] for piece in pieces[used:])
    expected = tiles_of(lengths, how)
    shares = cut_tiles([len(tiles) for _, _, tiles in expected], how.bounds)
    found = iter(pieces[:used])
    for (seq, begin, tiles), sizes in zip(expected, shares, strict=True):
        # Every tile once, in order, and the pieces of all blocks nearly alike.
        own = [next(found) for _ in sizes]
        assert [piece[:2] for piece in own] == [[seq, begin]] * len(sizes)
        edges = list(accumulate(sizes, initial=tiles.start))
        assert [tuple(piece[2:]) for piece in own] == list(pairwise(edges))
        assert edges[-1] == tiles.stop
        # The merge finds them by the rows of the block.
        start = before + sum(queries for queries, _ in lengths[:seq])
        block = start * how.per_kv // how.rows - before * how.per_kv // how.rows + seq
        block += begin // how.rows
        assert pieces[first_piece[block] : first_piece[block + 1]] == own
    assert next(found, None) is None


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_batch(data: st.DataObject) -> None:
    """Empty sequences, lengths of 0 and 1, windows, padding, blocks of parts of a query."""
    draw = data.draw
    lengths = []
    for _ in range(draw(st.integers(1, 12))):
        queries = draw(st.integers(0, 5))
        extra = draw(st.one_of(st.integers(0, 3), st.integers(0, 5000)))
        lengths.append((queries, queries + extra if queries else 0))
    if draw(st.booleans()):
        lengths.append((1, 0))  # as a graph is captured with
    per_kv, rows = draw(st.sampled_from([(1, 1), (4, 4), (4, 8), (3, 8), (20, 8), (5, 10)]))
    window = draw(st.sampled_from([0, 0, 1, 40, 700]))
    tile = draw(st.sampled_from([16, 64]))
    tokens = sum(queries for queries, _ in lengths)
    blocks = max(len(lengths), -(-tokens * per_kv // rows))
    bounds = piece_bounds(blocks, 1, draw(st.integers(2, 40)), 6000 // tile)
    if bounds is not None:
        check(lengths, Cut(rows, per_kv, tile, window, bounds), draw(st.integers(0, 9)),
              draw(st.integers(0, 3)))  # fmt: skip


@pytest.mark.parametrize("longest", [64, 128 << 10])
def test_one_long_sequence_among_short_ones(longest: int) -> None:
    """It gets nearly all of a device, of which equal splits gave it an eighth."""
    how = Cut(4, 4, 64, 0, Bounds(65, 33))
    lengths = [(1, longest)] + [(1, 1024)] * 7
    check(lengths, how)
    work = cut(lengths, how)
    count = int(work.first_piece[2])
    assert count == (1 if longest == 64 else 57)


def test_no_sequence_has_more_pieces_than_a_merge_takes() -> None:
    how = Cut(1, 1, 16, 0, Bounds(1000, 500))
    check([(1, 1 << 20)], how)
    assert cut([(1, 1 << 20)], how).first_piece[-1] == MAX_PIECES


def test_layers_of_a_step_share_a_list() -> None:
    batch = batch_of([(1, 900), (1, 30)], work_lists={})
    how = Cut(4, 4, 64, 0, Bounds(20, 10))
    work, launches = work_list(batch, range(2), range(2), how)
    assert len(launches) == 1
    assert work_list(batch, range(2), range(2), how) == (work, ())
    for other in (how._replace(tile=32), how._replace(window=128), how._replace(rows=8)):
        assert len(work_list(batch, range(2), range(2), other)[1]) == 1
    assert len(work_list(batch.first(1), range(1), range(1), how)[1]) == 1
    assert work_list(batch.first(1), range(1), range(1), how)[1] == ()


def test_a_batch_without_a_place_for_lists_keeps_none() -> None:
    batch = batch_of([(1, 900)])
    how = Cut(4, 4, 64, 0, Bounds(20, 10))
    for _ in range(2):
        assert len(work_list(batch, range(1), range(1), how)[1]) == 1


@pytest.mark.parametrize(
    ("row_blocks", "programs", "longest", "expected"),
    [
        (8, 8, 512, Bounds(65, 33)),
        (1, 1, 2048, Bounds(MAX_PIECES, 264)),
        (64, 8, 512, Bounds(132, 33)),
        (67, 8, 512, None),  # so many even out
        (8, 200, 512, None),  # one at a time
        (8, 8, 1, None),
        (8, 8, 2, Bounds(16, 33)),
    ],
)
def test_bounds(row_blocks: int, programs: int, longest: int, expected: Bounds | None) -> None:
    assert piece_bounds(row_blocks, programs, 264, longest) == expected
