"""What vLLM's own attention layer is asked for besides queries, keys and values."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType

from recalkv_vllm.checkpoint import CheckpointError


def check_stock_layer(
    layer: Any, scale: float, soft_cap: float | None, sinks: nn.Parameter | None
) -> None:
    """Whether latents can take the place of vLLM's attention ``layer``.

    Args:
        layer: of the module that is replaced.
        scale: of logits, as served.
        soft_cap: of logits, as served.
        sinks: as served.

    Raises:
        CheckpointError: it does something that latents are not served with.
    """
    impl = layer.impl
    asked = {
        f"a {type(layer).__name__}": type(layer) is not Attention,
        "attention that is not a decoder's": layer.attn_type != AttentionType.DECODER,
        "another layer's cache": layer.kv_sharing_target_layer_name is not None,
        "ALiBi": getattr(impl, "alibi_slopes", None) is not None,
        "other attention sinks": getattr(impl, "sinks", None) is not sinks,
        "another scale": not math.isclose(getattr(impl, "scale", scale), scale, rel_tol=1e-6),
        "another soft cap": (getattr(impl, "logits_soft_cap", soft_cap) or 0) != (soft_cap or 0),
    }
    for what, found in asked.items():
        if found:
            raise CheckpointError(
                f"recalkv: {layer.layer_name}: found {what}, which latents are not served with"
            )
