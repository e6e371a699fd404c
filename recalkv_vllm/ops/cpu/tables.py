"""Rotation tables of the C++ attention, made once per cos/sin cache: a model's layers share them.

**Expansion of low frequencies.** Within a chunk of positions ``[b, b + T)`` a low-frequency pair
hardly turns, and the cosines and sines of all such pairs are, to well below bf16 rounding,
combinations of very few functions of the offset: ``cos(θ (b + t)) ≈ Σ_m C_m φ_m(t)``, likewise
``sin`` with ``S_m``. The ``φ_m`` are the leading singular vectors of those rows in the first
chunk (shifting a chunk only mixes cosine and sine, so that they fit every one). A pair's share
of a score is then ``Σ_m φ_m(t) · (A_m · z_t)`` with ``A_m`` its factors folded into the query, once
per chunk, and its key rows need not be reconstructed. Chunks are tiles; the lowest frequencies are
folded once for a stretch of tiles, with functions that are combinations of a tile's in each of
them. How many pairs qualify is measured here on the table itself, whatever scaling made it.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakTensorKeyDictionary

#: Largest error of an expanded cosine or sine: the rounding of a bf16 key.
EXPANSION_ERROR = 2.0**-9
#: Functions of a tile, as multiples of a stretch's: with more of them fewer pairs are left to
#: reconstruct, and a query row costs more. Kernels choose by their query rows.
TERM_MULTIPLES = (2, 1)
#: Chunks that the search for the pairs looks at; what it finds is then checked on all.
SEARCHED_CHUNKS = 64
#: Pairs are padded to whole vectors.
PAIR_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class Expansion:
    """Low-frequency pairs as combinations of functions of the offset in a tile or a stretch.

    In order of falling frequency, ``exact_pairs`` are not expanded, ``tile_pairs`` within tiles
    and ``stretch_pairs`` within stretches. Coefficients are those of cosines, then of sines, with
    pairs up to :data:`PAIR_MULTIPLE`.

    Args:
        basis: ``[terms, tile]``.
        tile_coefficients: ``[tiles, terms, 2, tile_pairs]``.
        stretch_coefficients: ``[stretches, stretch terms, 2, stretch_pairs]``.
        stretch_basis: ``[tiles of a stretch, stretch terms, terms]``, a stretch's functions in each
            of its tiles as combinations of ``basis``.
    """

    exact_pairs: int
    tile_pairs: int
    stretch_pairs: int
    basis: torch.Tensor
    tile_coefficients: torch.Tensor
    stretch_coefficients: torch.Tensor
    stretch_basis: torch.Tensor


_tiles: MutableMapping[torch.Tensor, torch.Tensor] = WeakTensorKeyDictionary()
_expansions: MutableMapping[torch.Tensor, dict[int, list[Expansion]]] = WeakTensorKeyDictionary()


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


def expansions(cos_sin_cache: torch.Tensor, head_dim: int) -> list[Expansion]:
    """Expand as many pairs as :data:`EXPANSION_ERROR` allows, with each of TERM_MULTIPLES.

    Empty where no pair qualifies.
    """
    if cos_sin_cache not in _expansions:
        _expansions[cos_sin_cache] = {}
    known = _expansions[cos_sin_cache]
    if head_dim not in known:
        known[head_dim] = _expand(cos_sin_cache, head_dim)
    return known[head_dim]


def _expand(cos_sin_cache: torch.Tensor, head_dim: int) -> list[Expansion]:
    tile, terms, stretch = torch.ops.recalkv_cpu.table_sizes()
    by_tile = _Chunks.of(cos_sin_cache, head_dim, tile)
    by_stretch = _Chunks.of(cos_sin_cache, head_dim, stretch)
    found = []
    for multiple in TERM_MULTIPLES:
        of_tile = _first_fit(by_tile, multiple * terms)
        if of_tile is None:
            continue
        exact, basis, fitted = of_tile
        of_stretch = _first_fit(by_stretch, terms, exact, basis)
        first, stretch_basis, stretch_fitted = of_stretch or _none(by_stretch, terms)
        projected = stretch_basis.unflatten(1, (-1, tile)) @ basis.T
        # Balanced magnitudes: orthonormal functions of T positions are about T^-1/2.
        balance = tile**0.5
        found.append(
            Expansion(
                exact_pairs=exact,
                tile_pairs=first - exact,
                stretch_pairs=head_dim // 2 - first,
                basis=(basis * balance).contiguous(),
                tile_coefficients=_padded(fitted[:, :, : first - exact] / balance),
                stretch_coefficients=_padded(stretch_fitted),
                stretch_basis=(projected.transpose(0, 1) / balance).contiguous(),
            )
        )
    return found


@dataclass(frozen=True, slots=True)
class _Chunks:
    """A table by chunk.

    Args:
        rows: ``[chunks, 2, pairs, length]``, see :func:`by_chunk`; columns that RoPE leaves alone
            are pairs that never turn.
        partial: positions of the last chunk, 0 if it is whole.
        allowed: error of an expanded entry.
    """

    rows: torch.Tensor
    partial: int
    allowed: float

    @classmethod
    def of(cls, cos_sin_cache: torch.Tensor, head_dim: int, length: int) -> _Chunks:
        rows = by_chunk(cos_sin_cache, length)
        still = rows.new_zeros(rows.shape[0], 2, (head_dim - cos_sin_cache.shape[1]) // 2, length)
        still[:, 0] = 1
        allowed = EXPANSION_ERROR
        if cos_sin_cache.dtype != torch.float32:
            # The table's own rounding: in its entries, and in part in what is fitted to them.
            binade = 2.0 ** math.ceil(math.log2(rows.max()))
            allowed += 1.5 * binade * torch.finfo(cos_sin_cache.dtype).eps / 4
        return cls(torch.cat((rows, still), dim=2), cos_sin_cache.shape[0] % length, allowed)

    def sample(self) -> _Chunks:
        whole = self.rows[: self.rows.shape[0] - bool(self.partial)]
        return _Chunks(whole[:: -(-whole.shape[0] // SEARCHED_CHUNKS)], 0, self.allowed)

    def basis(self, first: int, terms: int) -> torch.Tensor:
        """``[terms, length]``: orthonormal functions for pairs from ``first`` on."""
        rows = self.rows[0, :, first:].flatten(0, 1).double()
        # Slow rows lie on few polynomials; the rest of a low-precision table is its rounding.
        offset = torch.linspace(-1, 1, rows.shape[1], dtype=torch.float64)
        smooth = torch.linalg.qr(offset[:, None] ** torch.arange(3 * terms)).Q
        return torch.linalg.svd(rows @ smooth @ smooth.T, full_matrices=False).Vh[:terms].float()

    def fit(self, first: int, basis: torch.Tensor, shown: torch.Tensor) -> torch.Tensor | None:
        """``[chunks, 2, pairs, terms]``: pairs from ``first`` on as combinations of ``basis``.

        ``shown`` are its functions as kernels will have them. None where an entry errs by more
        than is allowed.
        """
        slow = self.rows[:, :, first:]
        coefficients = slow @ basis.T
        error = (coefficients @ shown - slow).abs()
        if self.partial:
            # Fitted where there are positions; past them nothing is ever read.
            end = slow[-1, ..., : self.partial]
            coefficients[-1] = end @ torch.linalg.pinv(basis[:, : self.partial], rtol=1e-4)
            error[-1] = 0
            error[-1, ..., : self.partial] = (
                coefficients[-1] @ shown[:, : self.partial] - end
            ).abs()
        return None if error.numel() and error.max() > self.allowed else coefficients


def _first_fit(
    chunks: _Chunks, terms: int, first: int = 0, of_tile: torch.Tensor | None = None
) -> tuple[int, torch.Tensor, torch.Tensor] | None:
    """The first pair from which on ``terms`` functions do, these, and the coefficients.

    With ``of_tile: [its terms, tile]``, functions are combinations of these in each tile. None
    where there is no such pair, or no whole chunk to look at.
    """
    if chunks.rows.shape[0] <= bool(chunks.partial):
        return None
    sample = chunks.sample()
    # In turn, for rounding makes the error no monotonic function of the pairs.
    for pair in range(first, chunks.rows.shape[2]):
        basis = shown = chunks.basis(pair, terms)
        if of_tile is not None:
            by_tile = basis.unflatten(1, (-1, of_tile.shape[1]))
            shown = (by_tile @ of_tile.T @ of_tile).flatten(1)
        if sample.fit(pair, basis, shown) is None:
            continue
        coefficients = chunks.fit(pair, basis, shown)
        if coefficients is not None:
            return pair, basis, coefficients
    return None


def _none(chunks: _Chunks, terms: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    """As :func:`_first_fit`, of no pairs at all."""
    count, _, pairs, length = chunks.rows.shape
    return pairs, chunks.rows.new_zeros(terms, length), chunks.rows.new_zeros(count, 2, 0, terms)


def _padded(coefficients: torch.Tensor) -> torch.Tensor:
    """``[chunks, terms, 2, pairs up to PAIR_MULTIPLE]`` of ``[chunks, 2, pairs, terms]``."""
    missing = -coefficients.shape[2] % PAIR_MULTIPLE
    return torch.nn.functional.pad(coefficients.permute(0, 3, 1, 2), (0, missing)).contiguous()
