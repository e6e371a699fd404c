"""Codes of one block of columns from their distances: each column's prediction needs the last."""

from __future__ import annotations

import numba
import numpy as np

#: The largest integer that an element becomes.
LARGEST = 127
#: Tokens whose elements stay in a core's cache.
_TILE = 64
#: A float32 of this and what is far smaller is a whole number; halves are rounded to even.
_ROUNDING = 3 << 22


_BYTES, _FLOATS, _ROW = "uint8[:, ::1]", "float32[:, ::1]", "float32[:]"


# Compiled on import, once for all processes. Without "fastmath" no two operations become one, and
# each is rounded as NumPy's, which encode.
@numba.njit(
    f"void({_BYTES}, {_FLOATS}, float32[:, :], {_ROW}, {_ROW}, {_ROW}, {_ROW}, float32, {_BYTES}, "
    f"{_FLOATS})",
    nogil=True,
    cache=True,
)
def decode_block(
    distances, sums, inside, inverses, from_sum, scales, to_integer, middle, codes, integers
):
    """Decode into ``codes`` and ``integers``, and add what columns see of one another to ``sums``.

    Args:
        distances: ``[columns, tokens]`` uint8.
        sums: ``[columns, tokens]`` float32, of what comes before the block.
        inside: ``[columns, columns]`` weights, strictly lower triangular.
        inverses: ``[tokens]``, of the block's scales.
        from_sum: ``[columns]``, see ``LayerPredictor``.
        scales: ``[tokens]``.
        to_integer: ``[columns]``, see ``LayerPredictor``.
        middle: half the number of codes, float32.
        codes: ``[columns, tokens]`` uint8.
        integers: ``[columns, tokens]`` float32.
    """
    columns, tokens = distances.shape
    mask = np.int32(2 * middle - 1)
    largest_code, zero = np.float32(mask), np.float32(0)
    offset, largest = np.float32(0.5) - middle, np.float32(LARGEST)
    rounding = np.float32(_ROUNDING)
    for start in range(0, tokens, _TILE):
        end = min(start + _TILE, tokens)
        for j in range(columns):
            # Contiguous rows and no calls, for vector instructions.
            total, distance = sums[j, start:end], distances[j, start:end]
            code, integer = codes[j, start:end], integers[j, start:end]
            inverse, scale = inverses[start:end], scales[start:end]
            to_code, to_whole = from_sum[j], to_integer[j]
            for t in range(end - start):
                center = total[t] * (inverse[t] * to_code) + middle
                center = center if center > zero else zero
                center = center if center < largest_code else largest_code
                # Not negative: cutting is rounding down.
                whole = (np.int32(distance[t]) + np.int32(center)) & mask
                code[t] = np.uint8(whole)
                scaled = (np.float32(whole) + offset) * (scale[t] * to_whole)
                scaled = scaled if scaled > -largest else -largest
                scaled = scaled if scaled < largest else largest
                integer[t] = (scaled + rounding) - rounding
            for k in range(j + 1, columns):
                weight, other = inside[k, j], sums[k, start:end]
                for t in range(end - start):
                    other[t] += weight * integer[t]
