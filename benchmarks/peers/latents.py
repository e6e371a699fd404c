"""Latents of Palu and ReCalKV in codes, as in their papers.

Palu (arXiv 2407.21118), section 3.4: an orthogonal matrix is folded into the factors, so that no
element of a latent is far larger than the others; then each group's latent of a token is rounded
to equal steps between its least and its greatest element. ReCalKV (arXiv 2505.24357) does the same
after its own factors. Their matrix is Hadamard's; ranks here are no powers of two, and the matrix
is a random one, which spreads as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from recalkv_vllm.checkpoint import (
    FACTORS_FILE,
    AttentionGeometry,
    FactorReader,
    RecalkvConfig,
    read_hf_config,
)
from recalkv_vllm.compression.base_model.attention import CausalLM, attention_modules
from recalkv_vllm.compression.latents.rotation import rotate_latents
from recalkv_vllm.compression.latents.rounded_projection import rounded_projections
from recalkv_vllm.compression.layer import LayerFactors
from recalkv_vllm.span import Span

from .uniform import affine, affine_bytes


class GroupCodes:
    """Rounds each group's latent of a token with a float16 scale and offset of its own.

    Args:
        spans: of the groups of keys and of values; disjoint, and in order.
        bits: of a code.
    """

    def __init__(self, spans: Sequence[Span], bits: int):
        self.spans, self.bits = spans, bits

    def round_trip(self, z: torch.Tensor) -> torch.Tensor:
        """What the cache gives back of latents ``[..., rank]`` float32."""
        return torch.cat([affine(z[..., a:b], self.bits) for a, b in self.spans], dim=-1)

    @property
    def token_bytes(self) -> float:
        return sum(affine_bytes(span.width, self.bits, span.width) for span in self.spans)


def code_latents(network: CausalLM, directory: Path, bits: int) -> float:
    """Make ``network``, loaded from ``directory``, read keys and values from latents in codes.

    Args:
        network: of a checkpoint with split spans and unquantized latents.
        directory: of the checkpoint.
        bits: of a code.

    Returns:
        Bytes of a token over all layers.
    """
    hf_config = read_hf_config(directory)
    config = RecalkvConfig.from_hf_config(hf_config)
    geometry = AttentionGeometry.from_hf_config(hf_config)
    size = 0.0
    with FactorReader(directory / FACTORS_FILE, config, geometry) as reader:
        for i, attention in enumerate(attention_modules(network)):
            layout = config.layers[i]
            parts = (reader.read(i, name).float() for name in ("down", "k_up", "v_up"))
            factors = rotate_latents(LayerFactors(layout, *parts))
            codes: Any = GroupCodes((*layout.k_spans, *layout.v_spans), bits)
            projections: tuple[Any, Any] = rounded_projections(
                factors, codes, range(geometry.num_kv_heads), attention
            )
            attention.k_proj, attention.v_proj = projections
            size += codes.token_bytes
    return size
