"""Latents in bands: every column with as many bits as it is worth, in the paged cache.

A latent's columns are sorted by what losing them costs, and cut into *bands*: neighboring columns
of one bit width, in multiples of the 32 that share a scale (a *block*). All groups of a layer have
the same bands.

A token is stored as the codes of its bands, one band after the other, padded with zeros to a
multiple of 16 bytes, and one scale of a byte for every block. A page of ``block_size`` tokens holds
all its codes first, token after token, then all its scales.

* **Codes.** ``u`` of ``b`` bits stands for ``(u + 0.5 - 2**(b - 1)) · scale``. A band's codes are
  cut into *planes* of a power of two of bits, lowest bits first (:data:`PLANES`); a plane has its
  ``columns · bits / 8`` bytes together, earlier columns in lower bits.
* **Scales** are ``max|z| / 2**(b - 1)`` of their block, rounded up to a half float of which only
  exponent and three bits of the mantissa are kept: ``byte << 7`` are the bits of that half. They
  reach from 2**-17 to 61440 in steps of an eighth; factors are so made that latents are about 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch

from recalkv_vllm.key_scales import KEY_SCALE_BYTES
from recalkv_vllm.latent_format import LatentFormat, pack_bits, unpack_bits
from recalkv_vllm.span import Span

#: Columns that share a scale; bands, and the spans of latents in bands, are multiples of it.
BLOCK_COLUMNS = 32
#: Bits of a code, and the planes that it is stored in, lowest bits first.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}
#: A token's codes start at multiples of this many bytes.
CODE_ALIGNMENT = 16

_NAN, _INFINITY, _LARGEST = 0xFF, 0xF8, 0xF7
#: Bits of a float32's mantissa that a scale does not keep.
_DROPPED_BITS = 20
#: Biases of float32 and half exponents differ by this, at a scale's three bits of mantissa.
_REBIAS = (127 - 15) << 3


class Band(NamedTuple):
    """Neighboring columns of one bit width."""

    columns: int
    bits: int


class Plane(NamedTuple):
    """Some bits of all codes of a band.

    Args:
        columns: of the band.
        part: their bytes among those of a token's codes.
        bits: of each code.
        shift: of the lowest in the code.
    """

    columns: slice
    part: slice
    bits: int
    shift: int


@dataclass(frozen=True)
class BandFormat:
    """How latents in bands are stored.

    Args:
        bands: in the order of columns; plain pairs will do.

    Raises:
        ValueError: no bands, widths that are no multiples of 32, or unknown bits.
    """

    bands: tuple[Band, ...]
    dtype: ClassVar[str] = "bands"
    group_size: ClassVar[int] = BLOCK_COLUMNS

    def __post_init__(self) -> None:
        object.__setattr__(self, "bands", tuple(Band(*band) for band in self.bands))
        if not self.bands:
            raise ValueError("bands: expected one or more, found none")
        for band in self.bands:
            if band.columns <= 0 or band.columns % BLOCK_COLUMNS:
                raise ValueError(
                    f"bands: expected positive multiples of {BLOCK_COLUMNS} columns, "
                    f"found {band.columns}"
                )
            if band.bits not in PLANES:
                raise ValueError(
                    f"bands: expected {', '.join(map(str, PLANES))} bits, found {band.bits}"
                )

    @cached_property
    def rank(self) -> int:
        """Columns of a latent."""
        return sum(band.columns for band in self.bands)

    @cached_property
    def num_blocks(self) -> int:
        """Scales of a token."""
        return self.rank // BLOCK_COLUMNS

    @cached_property
    def used_bytes(self) -> int:
        """Bytes of a token's codes without padding."""
        return sum(map(band_bytes, self.bands))

    @cached_property
    def code_bytes(self) -> int:
        """Bytes of a token's codes, padding included."""
        return -(-self.used_bytes // CODE_ALIGNMENT) * CODE_ALIGNMENT

    def planes(self) -> Iterator[Plane]:
        """In the order of their bytes."""
        column = byte = 0
        for band in self.bands:
            columns, shift = slice(column, column + band.columns), 0
            for bits in PLANES[band.bits]:
                size = band.columns * bits // 8
                yield Plane(columns, slice(byte, byte + size), bits, shift)
                byte, shift = byte + size, shift + bits
            column += band.columns

    def slot_bytes(self, rank: int) -> int:
        """Bytes of one token, codes and scales; ``rank`` is that of the bands."""
        if rank != self.rank:
            raise ValueError(f"bands: expected a rank of {self.rank}, found {rank}")
        return self.code_bytes + self.num_blocks

    def rank_of(self, slot_bytes: int) -> int:
        """The rank, if slots have the right size.

        Raises:
            ValueError: they have not.
        """
        if slot_bytes != self.slot_bytes(self.rank):
            raise ValueError(
                f"expected slots of {self.slot_bytes(self.rank)} bytes, found {slot_bytes}"
            )
        return self.rank

    def within(self, span: Span) -> BandFormat:
        """The bands of a span of columns.

        Raises:
            ValueError: the span does not start and end where bands do.
        """
        return BandFormat(tuple(self.bands[slice(*self._band_range(span))]))

    def code_offset(self, span: Span) -> int:
        """Bytes of a token's codes in front of a span's.

        Raises:
            ValueError: the span does not start and end where bands do.
        """
        return sum(map(band_bytes, self.bands[: self._band_range(span)[0]]))

    def _band_range(self, span: Span) -> tuple[int, int]:
        starts = [0]
        for band in self.bands:
            starts.append(starts[-1] + band.columns)
        if span.start not in starts or span.end not in starts or span.width <= 0:
            raise ValueError(
                f"bands: expected edges at both ends of the span [{span.start}, {span.end}), "
                f"found edges at {', '.join(map(str, starts))}"
            )
        return starts.index(span.start), starts.index(span.end)

    def split_cache(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes ``[num_pages, block_size, code_bytes]`` and scales ``[…, num_blocks]``, uint8, of a
        paged cache ``[num_pages, block_size, slot_bytes]``, as views of it.

        Raises:
            ValueError: slots of another size.
            RuntimeError: pages are not contiguous.
        """
        num_pages, block_size, slot_bytes = kv_cache.shape
        self.rank_of(slot_bytes)
        flat = kv_cache.view(num_pages, block_size * slot_bytes)
        cut = block_size * self.code_bytes
        shape = (block_size, -1)
        return flat[:, :cut].unflatten(1, shape), flat[:, cut:].unflatten(1, shape)

    def quantize(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes ``[..., rank]`` (unpacked, uint8) and scales ``[..., num_blocks]`` (bytes)."""
        blocks = z.float().unflatten(-1, (-1, BLOCK_COLUMNS))
        half = self._half_ranges(z.device)
        scales = encode_scales(blocks.abs().amax(dim=-1) / half)
        scale = decode_scales(scales)
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        half = half[:, None]
        codes = (blocks * inverse[..., None]).floor() + half
        return codes.clamp(torch.zeros_like(half), 2 * half - 1).to(torch.uint8).flatten(-2), scales

    def dequantize(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Elements ``[..., rank]``, float32, of unpacked codes and scales."""
        half = self._half_ranges(codes.device)[:, None]
        units = codes.unflatten(-1, (-1, BLOCK_COLUMNS)).float() + (0.5 - half)
        return (units * decode_scales(scales)[..., None]).flatten(-2)

    def round_trip(self, z: torch.Tensor) -> torch.Tensor:
        """What the cache gives back for ``z: [..., rank]``, in ``z``'s dtype."""
        return self.dequantize(*self.quantize(z)).to(z.dtype)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Bytes ``[..., code_bytes]`` of unpacked codes ``[..., rank]``."""
        packed = codes.new_zeros((*codes.shape[:-1], self.code_bytes))
        for columns, part, bits, shift in self.planes():
            units = codes[..., columns] >> shift & ((1 << bits) - 1)
            packed[..., part] = pack_bits(units, bits)
        return packed

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Inverse of :meth:`pack`."""
        codes = packed.new_zeros((*packed.shape[:-1], self.rank))
        for columns, part, bits, shift in self.planes():
            codes[..., columns] |= unpack_bits(packed[..., part], bits) << shift
        return codes

    def _half_ranges(self, device: torch.device) -> torch.Tensor:
        """``2**(b - 1)`` of every block: ``[num_blocks]`` float32."""
        halves = [
            float(1 << (band.bits - 1))
            for band in self.bands
            for _ in range(band.columns // BLOCK_COLUMNS)
        ]
        return torch.tensor(halves, device=device)


#: How latents that are not cached as plain elements are stored.
CacheFormat = LatentFormat | BandFormat


def stored_format(
    bands: tuple[Band, ...] | None, uniform: LatentFormat | None
) -> CacheFormat | None:
    """How one layer's latents are stored: in its bands if it has any, else as all layers' are."""
    return uniform if bands is None else BandFormat(bands)


def token_bytes(
    latent_format: CacheFormat | None, rank: int, itemsize: int, key_scales: int = 0
) -> int:
    """Bytes of one token in the cache.

    Args:
        latent_format: how its latent is stored; None: as elements of ``itemsize`` bytes.
        key_scales: that it has besides, where keys are normed.
    """
    latent = rank * itemsize if latent_format is None else latent_format.slot_bytes(rank)
    return latent + KEY_SCALE_BYTES * key_scales


def slot_width(
    latent_format: CacheFormat | None, rank: int, dtype: torch.dtype, key_scales: int = 0
) -> int:
    """Width of a token's slot: elements of ``dtype``, or bytes where latents are quantized."""
    itemsize = dtype.itemsize if latent_format is None else 1
    return token_bytes(latent_format, rank, itemsize, key_scales) // itemsize


def band_bytes(band: Band) -> int:
    """Bytes of a band's codes."""
    return band.columns * band.bits // 8


def encode_scales(scales: torch.Tensor) -> torch.Tensor:
    """Bytes of scales that are not negative, rounded up; of 61440 and above that, NaN and infinity
    as such."""
    scales = scales.float()
    bits = scales.contiguous().view(torch.int32)
    normal = (bits + ((1 << _DROPPED_BITS) - 1) >> _DROPPED_BITS) - _REBIAS
    subnormal = (scales * 2.0**17).ceil()
    codes = torch.where(scales < 2.0**-14, subnormal, normal.clamp(0, _LARGEST).float())
    codes = torch.where(scales == torch.inf, _INFINITY, codes)
    return torch.where(scales.isnan(), _NAN, codes).to(torch.uint8)


def decode_scales(codes: torch.Tensor) -> torch.Tensor:
    """Scales in float32 of their bytes."""
    return (codes.to(torch.int16) << 7).view(torch.float16).float()


def bands_of(bits: Sequence[int]) -> tuple[Band, ...]:
    """Bands of blocks with these bits each; neighbors with as many bits are one band."""
    bands: list[Band] = []
    for b in bits:
        if bands and bands[-1].bits == b:
            bands[-1] = Band(bands[-1].columns + BLOCK_COLUMNS, b)
        else:
            bands.append(Band(BLOCK_COLUMNS, b))
    return tuple(bands)
