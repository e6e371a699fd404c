"""What plans of the CUDA decode kernel are made from and consist of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from recalkv_vllm.ops.contract import LatentLayer
from recalkv_vllm.span import Span


@dataclass(frozen=True, slots=True)
class Limits:
    """The device as far as plans depend on it: multiprocessors, shared bytes per block and SM."""

    multiprocessors: int
    shared_bytes: int
    shared_bytes_per_multiprocessor: int


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Sizes of one layer's attention; spans are those of its KV heads, one per head."""

    head_dim: int
    k_group_size: int
    k_spans: tuple[Span, ...]
    v_spans: tuple[Span, ...]
    key_bias: bool

    @classmethod
    def of(cls, layer: LatentLayer) -> LayerShape:
        """Read off a layer's constants."""
        return cls(
            head_dim=layer.head_dim,
            k_group_size=layer.k_group_size,
            k_spans=layer.head_k_spans,
            v_spans=layer.head_v_spans,
            key_bias=layer.k_bias is not None,
        )

    @property
    def k_width(self) -> int:
        return self.k_spans[0].width

    @property
    def v_width(self) -> int:
        return self.v_spans[0].width


@dataclass(frozen=True, slots=True)
class BlockShape:
    """What one block of threads owns; names as in ``csrc/cuda/params.h``."""

    column_tiles: int
    v_tiles: int
    heads: int
    teams: int
    stages: int
    tile_width: int
    resident: bool

    @property
    def columns(self) -> int:
        """Query rows of a block, under each of its KV heads."""
        return 8 * self.column_tiles

    @property
    def tokens(self) -> int:
        """Cached tokens of a tile: fewer where the output needs the registers (``shape.cuh``)."""
        return 16 if self.column_tiles * self.v_tiles > 16 else 32


@dataclass(frozen=True, slots=True)
class Plan(BlockShape):
    """How the kernel cuts up one layer's work.

    Args:
        blocks: ``(KV heads, V columns)`` blocks per block of query rows.
        blocks_per_multiprocessor: how many run at once on one.
    """

    shared_bytes: int
    blocks: int
    blocks_per_multiprocessor: int

    @property
    def lean(self) -> bool:
        """Only the kernel for Hopper has lean instantiations."""
        return False

    @property
    def turn_tokens(self) -> int:
        """Tokens that all teams take in a turn: what pieces are counted in."""
        return self.tokens * self.teams

    def kernel_shape(self) -> KernelShape:
        """What the kernel is told of it."""
        return KernelShape(
            self.column_tiles,
            self.v_tiles,
            self.heads,
            self.teams,
            self.stages,
            self.tile_width,
            int(self.resident),
            self.shared_bytes,
            int(self.lean),
        )


class KernelShape(NamedTuple):
    """The op's argument ``kernel``: ``DecodeParams::kernel`` in ``csrc/cuda/params.h``."""

    column_tiles: int
    v_tiles: int
    heads: int
    teams: int
    stages: int
    tile_width: int
    resident: int
    shared_bytes: int
    lean: int
