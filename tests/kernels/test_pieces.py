"""Pieces of equal cost: all tiles once, shares that are even, and the same from the device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recalkv_vllm.kernels import heuristics
from recalkv_vllm.kernels.columns import next_power_of_2
from recalkv_vllm.kernels.pieces import START_TILES, Piece, cut, makespan
from recalkv_vllm.kernels.schedule import schedule_shares

TILES = st.lists(st.integers(0, 40), min_size=1, max_size=9)


@settings(max_examples=200)
@given(tiles=TILES, programs=st.integers(1, 12))
def test_every_tile_is_in_one_piece(tiles: list[int], programs: int) -> None:
    pieces = cut(tiles, programs)
    owned = [(p.sequence, tile) for p in pieces for tile in range(p.first, p.end)]
    assert owned == [(s, tile) for s, count in enumerate(tiles) for tile in range(count)]
    numbers = [p.program + p.sequence for p in pieces]
    assert numbers == sorted(set(numbers))
    assert all(0 <= p.program < programs for p in pieces)


@settings(max_examples=200)
@given(tiles=TILES, programs=st.integers(1, 12))
def test_no_program_has_more_than_its_share(tiles: list[int], programs: int) -> None:
    costs = [count + START_TILES for count in tiles if count]
    share = -(-sum(costs) // programs)
    # A piece that does not start with its sequence has a start of its own.
    assert makespan(cut(tiles, programs)) <= share + START_TILES


def shares_of(lengths: list[int], programs: int, tile: int) -> list[list[int]]:
    shares = torch.full((programs, 4), -7, dtype=torch.int32)
    schedule_shares[(programs,)](
        torch.tensor(lengths, dtype=torch.int32),
        shares,
        len(lengths),
        PROGRAMS=programs,
        TILE=tile,
        START_TILES=START_TILES,
        SEQS=next_power_of_2(len(lengths)),
    )
    return shares.tolist()


def pieces_of(shares: list[list[int]], tiles: list[int]) -> list[Piece]:
    """What programs of a persistent grid do with their shares."""
    pieces = []
    for program, (first, first_tile, last, end_tile) in enumerate(shares):
        for sequence in range(first, last + 1):
            begin = first_tile if sequence == first else 0
            end = end_tile if sequence == last else tiles[sequence]
            if begin < end:
                pieces.append(Piece(program, sequence, begin, end))
    return pieces


@pytest.mark.skipif(torch.cuda.is_available(), reason="tensors are on the CPU")
@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 700), min_size=1, max_size=9), programs=st.integers(1, 9))
def test_the_device_cuts_the_same(lengths: list[int], programs: int) -> None:
    tiles = [-(-length // 32) for length in lengths]
    assert pieces_of(shares_of(lengths, programs, 32), tiles) == cut(tiles, programs)


def test_a_long_sequence_among_short_ones() -> None:
    """One of 128k tokens and seven of 1k, Llama-3.1-8B on an H100: 8 KV heads, two programs on
    each of 132 multiprocessors, in tiles of 64 tokens."""
    lengths, heads = [131072] + [1024] * 7, 8
    target = heuristics.Target(90, 132)
    tiles = [length // 64 for length in lengths]
    splits = heuristics.split_count(len(lengths) * heads, max(tiles), target)
    equal = max(-(-count // splits) for count in tiles) + START_TILES
    found = makespan(cut(tiles, 2 * target.num_sms // heads))
    assert equal == 514
    assert found == 68
    least = sum(tiles) / (2 * target.num_sms // heads)
    assert found < 1.1 * least
