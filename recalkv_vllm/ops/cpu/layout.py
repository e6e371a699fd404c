"""A layer's constants as the C++ attention takes them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from recalkv_vllm.ops.contract import LatentLayer
from recalkv_vllm.ops.cpu import tables
from recalkv_vllm.ops.rotary import pair_order

#: In place of a bound on positions, where keys are not rotated.
ANY_POSITION = 2**31 - 1


class PackedLayer(NamedTuple):
    """Arguments of the torch op, in its order; columns of a head are in pair order.

    Args:
        k_factors: ``[h_kv, d, k_width]``, in the dtype that products are computed in.
        k_bias: ``[h_kv, d]`` float32.
        k_norm_weight: ``[d]`` float32.
        rope: see :func:`tables.rope_tiles`.
        basis: see :class:`tables.Expansion`, as for the next.
        coefficients: alike.
        pair_factors: ``[h_kv, pairs, k_width, 2]``, rows of ``k_factors`` that are expanded.
        k_starts: first columns of the K groups' spans.
        v_starts: of the V groups'.
        soft_cap: 0 is none.
        window: 0 is none.
    """

    k_factors: torch.Tensor
    k_bias: torch.Tensor | None
    k_norm_weight: torch.Tensor | None
    rope: torch.Tensor | None
    basis: torch.Tensor | None
    coefficients: torch.Tensor | None
    pair_factors: torch.Tensor | None
    k_starts: list[int]
    v_starts: list[int]
    v_width: int
    max_position: int
    is_neox: bool
    scale: float
    k_norm_eps: float
    soft_cap: float
    window: int
    isa: str


def pack_layer(layer: LatentLayer, isa: str) -> PackedLayer:
    """Pack for one instruction set."""
    bf16_products = isa == "avx512_bf16"
    order = pair_order(layer.head_dim, layer.rot_dim, layer.is_neox)
    k_factors = layer.k_up.reshape(-1, layer.head_dim, layer.k_width)[:, order]
    k_factors = k_factors.to(torch.bfloat16 if bf16_products else torch.float32).contiguous()
    bias, norm, rope = layer.k_bias, layer.k_norm_weight, layer.cos_sin_cache
    basis = coefficients = pair_factors = None
    # A key norm needs the whole key.
    if bf16_products and rope is not None and norm is None:
        expansion = tables.expansion(rope, layer.head_dim)
        if expansion is not None:
            basis, coefficients = expansion.basis, expansion.coefficients
            slow = k_factors[:, 2 * expansion.exact_pairs :]
            pair_factors = slow.unflatten(1, (-1, 2)).transpose(2, 3).contiguous()
    return PackedLayer(
        k_factors=k_factors,
        k_bias=None if bias is None else bias[:, order].float().contiguous(),
        k_norm_weight=None if norm is None else norm[order].float().contiguous(),
        rope=None if rope is None else tables.rope_tiles(rope),
        basis=basis,
        coefficients=coefficients,
        pair_factors=pair_factors,
        k_starts=[span.start for span in layer.k_spans],
        v_starts=[span.start for span in layer.v_spans],
        v_width=layer.v_width,
        max_position=ANY_POSITION if rope is None else rope.shape[0],
        is_neox=layer.is_neox,
        scale=layer.scale,
        k_norm_eps=layer.k_norm_eps,
        soft_cap=layer.soft_cap or 0.0,
        window=layer.sliding_window or 0,
        isa=isa,
    )
