"""Which compressions can be reached at all; refused before any work otherwise."""

from __future__ import annotations

import math

from recalkv_vllm.checkpoint import SPAN_MULTIPLE, AttentionGeometry, rank_budget
from recalkv_vllm.compression.errors import InputError


def check_compression(
    compression: float, geometry: AttentionGeometry, k_group_size: int, v_groups: int
) -> None:
    """Raise :class:`InputError` unless every head group can get the least rank, or the full one.

    The message names what is possible: the largest compression, or a group size.
    """
    k_groups = geometry.num_kv_heads // k_group_size
    for kind, heads in (
        ("k-group-size", k_group_size),
        ("v-groups", geometry.num_kv_heads // v_groups),
    ):
        width = heads * geometry.head_dim
        if width < SPAN_MULTIPLE or (compression == 0 and width % SPAN_MULTIPLE):
            need = f"a multiple of {SPAN_MULTIPLE}" if compression == 0 else f">= {SPAN_MULTIPLE}"
            raise InputError(
                f"compression {compression}: a group of {heads} heads of {geometry.head_dim} is "
                f"{width} wide, expected {need}; choose another --{kind}"
            )
    check_budget(compression, geometry, f"{k_groups} K and {v_groups} V", k_groups + v_groups)


def check_budget(compression: float, geometry: AttentionGeometry, kinds: str, groups: int) -> None:
    """Raise :class:`InputError` unless each of ``groups`` latents per layer can get rank 16.

    ``kinds`` names them. The message names the largest possible compression.
    """
    budget = rank_budget(compression, geometry)
    least = geometry.num_layers * SPAN_MULTIPLE * groups
    if budget < least:
        possible = largest_compression(least, geometry.dense_width * geometry.num_layers)
        raise InputError(
            f"compression {compression}: leaves {budget} cached elements per token, less than the "
            f"{least} of rank {SPAN_MULTIPLE} in each of {kinds} groups per layer; the largest "
            f"possible compression with these groups is {possible:g}"
        )


def largest_compression(least: int, dense: int) -> float:
    """Fraction of ``dense`` to remove that leaves ``least``.

    Rounded down to four digits: the fraction named in a message must itself be accepted.
    """
    return math.floor((1 - least / dense) * 1e4) / 1e4
