"""A bound layer as the cost model sees it."""

from __future__ import annotations

from recalkv_vllm.band_format import BandFormat, token_bytes
from recalkv_vllm.cost import LayerCost
from recalkv_vllm.ops.contract import LatentLayer
from recalkv_vllm.ops.triton.plan import most_code_bits


def layer_cost(layer: LatentLayer) -> LayerCost:
    """Sizes of a layer's attention, for one query head to a KV head."""
    keys, values = layer.k_spans[0], layer.v_spans[0]
    bands = layer.latent_format if isinstance(layer.latent_format, BandFormat) else None
    # Nobody may read the last columns; only the format of bands tells of them.
    read = max(span.end for span in (*layer.k_spans, *layer.v_spans))
    rank = read if bands is None else bands.rank
    return LayerCost(
        num_heads=layer.num_kv_heads,
        num_kv_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
        k_group_size=layer.k_group_size,
        v_group_size=layer.heads_per_v,
        k_width=layer.k_width,
        v_width=layer.v_width,
        shared=max(0, min(keys.end, values.end) - max(keys.start, values.start)),
        token_bytes=token_bytes(layer.latent_format, rank, layer.k_up.element_size()),
        code_bits=most_code_bits(layer.latent_format),
        bands=bands is not None,
    )
