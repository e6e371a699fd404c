"""How quantized latents lie in the paged cache: the format that kernels and offline tool share.

A token's latent of ``rank`` elements is stored as ``rank`` codes and one bfloat16 scale for every
``group_size`` neighboring elements. A block of ``block_size`` tokens holds all its codes first,
token after token, then all its scales, so that both stay aligned without padding.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

#: Bits of a code.
BITS = {"int8": 8, "fp8": 8, "int4": 4, "int3": 3}
FP8 = torch.float8_e4m3fn
LARGEST_FP8 = torch.finfo(FP8).max
SCALE_BYTES = 2
#: Smaller scales are stored as zero: their inverse could be infinite, and zeros then NaN.
SMALLEST_SCALE = torch.finfo(torch.bfloat16).tiny
#: Elements per scale; a multiple of the 16 that spans start and end at.
GROUP_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class LatentFormat:
    """Codes and scales of a quantized latent.

    An integer code ``u`` of ``b`` bits stands for ``(u + 0.5 - 2**(b - 1)) · scale`` with ``scale =
    max|z| / 2**(b - 1)`` over its group: all codes are used, and the largest element is off by half
    a step like any other. An fp8 code (e4m3) stands for itself times ``max|z| / 448``.

    Args:
        dtype: ``int8``, ``fp8``, ``int4`` or ``int3``.
        group_size: elements per scale, counted from the start of the latent; the last group may be
            short. 0: one scale for the whole latent.
    """

    dtype: str
    group_size: int = 32

    def __post_init__(self) -> None:
        if self.dtype not in BITS:
            raise ValueError(f"dtype: expected one of {', '.join(BITS)}, found {self.dtype!r}")
        if self.group_size != 0 and self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"group_size: expected 0 or one of {', '.join(map(str, GROUP_SIZES))}, "
                f"found {self.group_size!r}"
            )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> LatentFormat:
        """Read what :meth:`to_dict` wrote. Raises :class:`ValueError` for anything else."""
        if (
            set(raw) != {"dtype", "group_size"}
            or not isinstance(raw["dtype"], str)
            or not isinstance(raw["group_size"], int)
            or isinstance(raw["group_size"], bool)
        ):
            raise ValueError(f"expected dtype and group_size, found {dict(raw)!r}")
        return cls(**raw)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def bits(self) -> int:
        return BITS[self.dtype]

    @property
    def scale_shift(self) -> int:
        """Column ``c`` has scale ``c >> scale_shift``; 30 makes that the only one."""
        return self.group_size.bit_length() - 1 if self.group_size else 30

    def num_groups(self, rank: int) -> int:
        """Scales of one token."""
        return -(-rank // self.group_size) if self.group_size else 1

    def code_bytes(self, rank: int) -> int:
        """Bytes of one token's codes; ``rank`` is a multiple of 16."""
        return rank * self.bits // 8

    def slot_bytes(self, rank: int) -> int:
        """Bytes of one token, codes and scales."""
        return self.code_bytes(rank) + SCALE_BYTES * self.num_groups(rank)

    def rank_of(self, slot_bytes: int) -> int:
        """The rank whose slots have this many bytes.

        Raises:
            ValueError: there is none.
        """
        return _rank_of(self, slot_bytes)

    def split_cache(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed codes ``[num_blocks, block_size, code_bytes]`` and scales ``[…, groups]`` of a
        paged cache ``[num_blocks, block_size, slot_bytes]``, as views of it.

        Raises:
            ValueError: no rank has such slots.
            RuntimeError: blocks are not contiguous.
        """
        num_blocks, block_size, slot_bytes = kv_cache.shape
        flat = kv_cache.view(num_blocks, block_size * slot_bytes)
        cut = block_size * self.code_bytes(self.rank_of(slot_bytes))
        codes, scales = flat[:, :cut], flat[:, cut:].view(torch.bfloat16)
        return codes.unflatten(1, (block_size, -1)), scales.unflatten(1, (block_size, -1))

    def quantize(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes ``[..., rank]`` (unpacked, uint8) and scales ``[..., groups]`` (bfloat16) of ``z``.

        Codes are chosen for the rounded scale. A group of zeros, or of elements so small that the
        scale would not be a normal number, has scale zero.
        """
        groups = self._grouped(z.float())
        largest = groups.abs().amax(dim=-1, keepdim=True)
        half = 1 << (self.bits - 1)
        steps = LARGEST_FP8 if self.dtype == "fp8" else half
        scale = (largest / steps).to(torch.bfloat16)
        scale = torch.where(scale < SMALLEST_SCALE, 0.0, scale)
        inverse = torch.where(scale == 0, 0.0, 1 / scale.float())
        scaled = groups * inverse
        if self.dtype == "fp8":
            codes = scaled.clamp(-LARGEST_FP8, LARGEST_FP8).to(FP8).view(torch.uint8)
        else:
            codes = (scaled.floor() + half).clamp(0, 2 * half - 1).to(torch.uint8)
        return codes.flatten(-2)[..., : z.shape[-1]], scale.squeeze(-1)

    def dequantize(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Elements ``[..., rank]``, float32, of unpacked codes and scales."""
        if self.dtype == "fp8":
            units = codes.view(FP8).float()
        else:
            units = codes.float() + (0.5 - (1 << (self.bits - 1)))
        size = self.group_size or codes.shape[-1]
        return units * scales.float().repeat_interleave(size, dim=-1)[..., : codes.shape[-1]]

    def round_trip(self, z: torch.Tensor) -> torch.Tensor:
        """What the cache gives back for ``z: [..., rank]``, in ``z``'s dtype."""
        return self.dequantize(*self.quantize(z)).to(z.dtype)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Bytes ``[..., code_bytes]`` of unpacked codes ``[..., rank]``.

        int4: column ``2i`` in the low half of byte ``i``, ``2i + 1`` in the high one. int3: the two
        low bits of all columns, four to a byte, then the high bits, eight to a byte; earlier
        columns in lower bits.
        """
        if self.bits == 8:
            return codes
        if self.bits == 4:
            return pack_bits(codes, 4)
        return torch.cat((pack_bits(codes & 3, 2), pack_bits(codes >> 2, 1)), dim=-1)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Inverse of :meth:`pack`."""
        if self.bits == 8:
            return packed
        if self.bits == 4:
            return unpack_bits(packed, 4)
        low = packed.shape[-1] * 2 // 3
        return unpack_bits(packed[..., :low], 2) | unpack_bits(packed[..., low:], 1) << 2

    def _grouped(self, z: torch.Tensor) -> torch.Tensor:
        rank = z.shape[-1]
        size = self.group_size or rank
        padded = torch.nn.functional.pad(z, (0, -rank % size))
        return padded.unflatten(-1, (-1, size))


@functools.cache
def _rank_of(latent_format: LatentFormat, slot_bytes: int) -> int:
    guess = slot_bytes * 8 // latent_format.bits // 16 * 16
    for rank in range(guess, 0, -16):
        if latent_format.slot_bytes(rank) == slot_bytes:
            return rank
        if latent_format.slot_bytes(rank) < slot_bytes:
            break
    raise ValueError(f"expected the slot bytes of a rank in {latent_format}, found {slot_bytes}")


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of up to 8 bits as bytes, as many to each as fit, earlier ones in lower bits."""
    per_byte = 8 // bits
    shifts = bits * torch.arange(per_byte, dtype=torch.uint8, device=codes.device)
    return (codes.unflatten(-1, (-1, per_byte)) << shifts).sum(dim=-1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of :func:`pack_bits`."""
    shifts = bits * torch.arange(8 // bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts & ((1 << bits) - 1)).flatten(-2)
