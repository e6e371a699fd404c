"""A layer's constants as the C++ ops take them: objects, checked when they are made."""

from __future__ import annotations

from typing import Protocol

import torch

from recalkv_vllm.band_format import BandFormat, CacheFormat
from recalkv_vllm.ops.contract import LatentLayer
from recalkv_vllm.ops.cpu import tables
from recalkv_vllm.ops.rotary import pair_order


class AttentionLayer(Protocol):
    """A layer packed for one instruction set (``csrc/cpu/attention_layer.h``)."""

    def attend(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        /,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``recalkv_cpu::paged_latent_attention`` of this layer."""


class StoredFormat(Protocol):
    """How latents are stored (``LatentFormat`` of ``csrc/cpu/quantization.h``)."""

    def update(
        self, z: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor, /
    ) -> None:
        """``recalkv_cpu::latent_cache_update`` in this format."""


def pack_format(latent_format: CacheFormat | None) -> StoredFormat:
    """Hand a format over; None stores latents as they are."""
    made = torch.classes.recalkv_cpu.LatentFormat
    if latent_format is None:
        return made(dtype="", group_size=0, bands=[])
    bands = latent_format.bands if isinstance(latent_format, BandFormat) else ()
    return made(
        dtype=latent_format.dtype,
        group_size=latent_format.group_size,
        bands=[number for band in bands for number in band],
    )


def pack_layer(layer: LatentLayer, latent_format: StoredFormat, isa: str) -> AttentionLayer:
    """Pack a layer's constants for one instruction set.

    Columns of a head are in pair order.
    """
    bf16_products = isa == "avx512_bf16"
    classes = torch.classes.recalkv_cpu
    order = pair_order(layer.head_dim, layer.rot_dim, layer.is_neox)
    k_factors = layer.k_up.reshape(-1, layer.head_dim, layer.k_width)[:, order]
    k_factors = k_factors.to(torch.bfloat16 if bf16_products else torch.float32).contiguous()
    rope, norm, bias = layer.cos_sin_cache, layer.k_norm_weight, layer.k_bias
    rotation = expansion = None
    if rope is not None:
        rotation = classes.Rotation(
            tiles=tables.rope_tiles(rope), max_position=rope.shape[0], is_neox=layer.is_neox
        )
        # A key norm needs the whole key.
        if bf16_products and norm is None:
            expansion = _expansion(k_factors, rope)
    return classes.AttentionLayer(
        isa=isa,
        keys=classes.Keys(
            factors=k_factors,
            bias=None if bias is None else bias[:, order].float().contiguous(),
            norm_weight=None if norm is None else norm[order].float().contiguous(),
            norm_eps=layer.k_norm_eps,
        ),
        spans=classes.Spans(
            k_starts=[span.start for span in layer.k_spans],
            v_starts=[span.start for span in layer.v_spans],
            v_width=layer.v_width,
        ),
        rotation=rotation,
        expansion=expansion,
        logits=classes.Logits(
            scale=layer.scale,
            soft_cap=layer.soft_cap or 0.0,
            window=layer.sliding_window or 0,
        ),
        latent_format=latent_format,
    )


def _expansion(k_factors: torch.Tensor, rope: torch.Tensor) -> torch.ScriptObject | None:
    """Low-frequency pairs of ``k_factors: [h_kv, d, k_width]``, packed; None if there are none."""
    found = tables.expansion(rope, k_factors.shape[1])
    if found is None:
        return None
    slow = k_factors[:, 2 * found.exact_pairs :]
    return torch.classes.recalkv_cpu.Expansion(
        basis=found.basis,
        coefficients=found.coefficients,
        pair_factors=slow.unflatten(1, (-1, 2)).transpose(2, 3).contiguous(),
    )
