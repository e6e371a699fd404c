"""Rotation of latents before they are quantized, folded into the factors: it costs nothing served.

Quantization gives every element of a group the same step. In the factors' own basis a few elements
of a latent are far larger than the rest, and far more is at stake in them; after a random
orthogonal rotation all are alike. It is the rotation of QuaRot (arXiv 2404.00456) and of Palu's
section 3.4, without the need for it to be fast.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import torch

from recalkv_vllm.band_format import BLOCK_COLUMNS
from recalkv_vllm.checkpoint import LatentLayout
from recalkv_vllm.compression.layer import LayerFactors
from recalkv_vllm.span import Span

SEED = 0


def rotate_latents(factors: LayerFactors) -> LayerFactors:
    """The same layer with rotated latents: ``up Q``, ``Qᵀ down``.

    Columns that the same groups read are rotated among each other, so that spans stay as they are;
    of latents in bands, those that share a scale.
    """
    layout = factors.layout
    down, k_up, v_up = factors.down.clone(), factors.k_up.clone(), factors.v_up.clone()
    heads_per_v_group = len(v_up) // len(layout.v_spans)
    for region in rotated_regions(layout):
        start, end = region
        rotation = random_rotation(region.width).to(down)
        down[start:end] = rotation.T @ down[start:end]
        for group, (first, last) in enumerate(layout.k_spans):
            if first <= start < last:
                columns = slice(start - first, end - first)
                k_up[group, :, columns] = k_up[group, :, columns] @ rotation
        for head in range(len(v_up)):
            first, last = layout.v_spans[head // heads_per_v_group]
            if first <= start < last:
                columns = slice(start - first, end - first)
                v_up[head, :, columns] = v_up[head, :, columns] @ rotation
    return replace(factors, down=down, k_up=k_up, v_up=v_up)


def rotated_regions(layout: LatentLayout) -> list[Span]:
    """Columns that are rotated among each other, in order."""
    if layout.bands is None:
        return regions(layout)
    return [Span(i, i + BLOCK_COLUMNS) for i in range(0, layout.rank, BLOCK_COLUMNS)]


def unit_blocks(factors: LayerFactors, second_moment: torch.Tensor) -> LayerFactors:
    """The same layer with columns that share a scale scaled to a mean square of 1.

    Scales of latents in bands have few bits of exponent.

    Args:
        factors: of the layer.
        second_moment: ``[H, H]`` of its input.
    """
    layout, down = factors.layout, factors.down
    variance = torch.einsum("rh,hk,rk->r", down, second_moment, down).clamp(min=0)
    blocks = variance.unflatten(0, (-1, BLOCK_COLUMNS)).mean(dim=1)
    blocks = torch.where(blocks > 0, blocks, 1.0)
    scale = blocks.sqrt().repeat_interleave(BLOCK_COLUMNS)
    of_keys, of_values = (
        torch.stack([scale[span.start : span.end] for span in spans]) for spans in layout.all_spans
    )
    per_group = len(factors.v_up) // len(layout.v_spans)
    return replace(
        factors,
        down=down / scale[:, None],
        k_up=factors.k_up * of_keys[:, None],
        v_up=factors.v_up * of_values.repeat_interleave(per_group, dim=0)[:, None],
    )


def regions(layout: LatentLayout) -> list[Span]:
    """Cuts the latent where a span starts or ends; in order."""
    cuts = {0, layout.rank, *(x for span in (*layout.k_spans, *layout.v_spans) for x in span)}
    return [Span(start, end) for start, end in pairwise(sorted(cuts))]


@cache
def random_rotation(size: int) -> torch.Tensor:
    """A random orthogonal matrix, the same for a size every time: ``[size, size]`` float64."""
    generator = torch.Generator().manual_seed(SEED + size)
    normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(normal)
    return basis * triangle.diagonal().sign()
