"""Rotation tables of the C++ attention, made once per cos/sin cache: a model's layers share them.

**Expansion of low frequencies.** Within a stretch of positions ``[b, b + T)`` a low-frequency pair
hardly turns, and the cosines and sines of all such pairs are, to well below bf16 rounding,
combinations of very few functions of the offset: ``cos(θ (b + t)) ≈ Σ_m C_m φ_m(t)``, likewise
``sin`` with ``S_m``. The ``φ_m`` are the leading singular vectors of those rows in the first
stretch (shifting a stretch only mixes cosine and sine, so that they fit every one). A pair's share
of a score is then ``Σ_m φ_m(t) · (A_m · z_t)`` with ``A_m`` its factors folded into the query, once
per stretch, and its key rows need not be reconstructed. How many pairs qualify is measured here on
the table itself, whatever scaling made it.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakTensorKeyDictionary

#: Largest error of an expanded cosine or sine: the rounding of a bf16 key.
EXPANSION_ERROR = 2.0**-9
#: Stretches that the search for the pairs looks at; what it finds is then checked on all.
SEARCHED_STRETCHES = 64
#: Pairs are padded to whole vectors.
PAIR_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class Expansion:
    """Low-frequency pairs as combinations of ``terms`` functions.

    Args:
        exact_pairs: pairs before this one, in order of falling frequency, are not expanded.
        basis: ``[terms, stretch]``.
        coefficients: ``[stretches, terms, 2, expanded pairs up to PAIR_MULTIPLE]``, cosines, sines.
    """

    exact_pairs: int
    basis: torch.Tensor
    coefficients: torch.Tensor


_tiles: MutableMapping[torch.Tensor, torch.Tensor] = WeakTensorKeyDictionary()
_expansions: MutableMapping[torch.Tensor, dict[int, Expansion | None]] = WeakTensorKeyDictionary()


def by_chunk(cos_sin_cache: torch.Tensor, chunk: int) -> torch.Tensor:
    """``[chunks, 2, rot_dim / 2, chunk]`` float32: cosines and sines of each chunk, by pair.

    Positions past the end of the cache repeat the last one.
    """
    positions, rot_dim = cos_sin_cache.shape
    padded = torch.arange(-(-positions // chunk) * chunk).clamp(max=positions - 1)
    table = cos_sin_cache.float()[padded]
    return table.view(-1, chunk, 2, rot_dim // 2).permute(0, 2, 3, 1).contiguous()


def rope_tiles(cos_sin_cache: torch.Tensor) -> torch.Tensor:
    """The exact table, by tile: ``[tiles, 2, rot_dim / 2, tile]`` float32."""
    if cos_sin_cache not in _tiles:
        tile, _, _ = torch.ops.recalkv_cpu.table_sizes()
        _tiles[cos_sin_cache] = by_chunk(cos_sin_cache, tile)
    return _tiles[cos_sin_cache]


def expansion(cos_sin_cache: torch.Tensor, head_dim: int) -> Expansion | None:
    """Expand as many pairs as :data:`EXPANSION_ERROR` allows; None where none qualifies."""
    if cos_sin_cache not in _expansions:
        _expansions[cos_sin_cache] = {}
    known = _expansions[cos_sin_cache]
    if head_dim not in known:
        known[head_dim] = _expand(cos_sin_cache, head_dim)
    return known[head_dim]


def _expand(cos_sin_cache: torch.Tensor, head_dim: int) -> Expansion | None:
    _, terms, stretch = torch.ops.recalkv_cpu.table_sizes()
    partial = cos_sin_cache.shape[0] % stretch
    if cos_sin_cache.shape[0] < stretch:
        return None
    whole = by_chunk(cos_sin_cache, stretch)
    # Columns that RoPE leaves alone are pairs that never turn.
    still = whole.new_zeros(whole.shape[0], 2, (head_dim - cos_sin_cache.shape[1]) // 2, stretch)
    still[:, 0] = 1
    whole = torch.cat((whole, still), dim=2)
    allowed = EXPANSION_ERROR
    if cos_sin_cache.dtype != torch.float32:
        # The table's own rounding: in its entries, and in part in what is fitted to them.
        binade = 2.0 ** math.ceil(math.log2(whole.max()))
        allowed += 1.5 * binade * torch.finfo(cos_sin_cache.dtype).eps / 4
    # Slow rows lie on few polynomials; the rest of a low-precision table is its rounding.
    offset = torch.linspace(-1, 1, stretch, dtype=torch.float32)
    smooth = torch.linalg.qr(offset[:, None] ** torch.arange(3 * terms)).Q

    def fit(exact: int, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        slow = table[:, :, exact:]
        rows = slow[0].flatten(0, 1) @ smooth @ smooth.T
        basis = torch.linalg.svd(rows, full_matrices=False).Vh[:terms]
        coefficients = slow @ basis.T
        error = (coefficients @ basis - slow).abs()
        if table is whole and partial:
            # Fitted where there are positions; past them nothing is ever read.
            end = slow[-1, ..., :partial]
            coefficients[-1] = end @ torch.linalg.pinv(basis[:, :partial], rtol=1e-4)
            error[-1] = 0
            error[-1, ..., :partial] = (coefficients[-1] @ basis[:, :partial] - end).abs()
        return None if error.max() > allowed else (basis, coefficients)

    pairs = head_dim // 2
    sample = whole[: whole.shape[0] - bool(partial)]
    sample = sample[:: -(-sample.shape[0] // SEARCHED_STRETCHES)]
    # In turn, for rounding makes the error no monotonic function of the pairs.
    for exact in range(pairs):
        if fit(exact, sample) is not None and (fitted := fit(exact, whole)) is not None:
            break
    else:
        return None
    basis, coefficients = fitted
    padding = -(pairs - exact) % PAIR_MULTIPLE
    # Balanced magnitudes: orthonormal functions of T positions are about T^-1/2.
    balance = stretch**0.5
    coefficients = torch.nn.functional.pad(coefficients.permute(0, 3, 1, 2), (0, padding))
    return Expansion(
        exact_pairs=exact,
        basis=(basis * balance).contiguous(),
        coefficients=(coefficients / balance).contiguous(),
    )
