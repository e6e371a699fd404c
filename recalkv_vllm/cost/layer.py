"""A layer's attention, as far as its cost depends on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """Sizes of one layer's attention over a compressed cache.

    Args:
        num_heads: query heads.
        num_kv_heads: KV heads.
        head_dim: elements of a head.
        k_group_size: KV heads per K group.
        v_group_size: KV heads per V group.
        k_width: columns of a K span.
        v_width: columns of a V span.
        shared: columns of a K span that are also the V span's.
        token_bytes: of a cached token.
        code_bits: of the widest codes; None of elements.
        bands: whether codes are in bands.
        queries: query tokens of one sequence in a step.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    k_group_size: int
    v_group_size: int
    k_width: int
    v_width: int
    shared: int
    token_bytes: int
    code_bits: int | None
    bands: bool
    queries: int = 1

    @property
    def coded(self) -> bool:
        """Whether latents are dequantized."""
        return self.code_bits is not None

    @property
    def rows(self) -> int:
        """Query rows under a KV head."""
        return self.queries * self.num_heads // self.num_kv_heads

    @property
    def columns(self) -> int:
        """Columns that a KV head reads."""
        return self.k_width + self.v_width - self.shared

    @property
    def columns_of_all(self) -> int:
        """Columns that all KV heads read together."""
        keys = self.k_width * (self.num_kv_heads // self.k_group_size)
        values = self.v_width * (self.num_kv_heads // self.v_group_size)
        # V spans that K spans lie in; of one V group and several K groups, all of them.
        return values + keys - self.shared * (self.num_kv_heads // self.k_group_size)

    @property
    def factor_bytes(self) -> int:
        """Of the K and V up factors, 16 bits each."""
        return 2 * self.num_kv_heads * self.head_dim * (self.k_width + self.v_width)
