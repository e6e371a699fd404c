"""Predicted time to decode, and how it compares with the dense cache.

Of attention alone, over long contexts: launches, the work list, the merge of pieces and what runs
beside attention are not in it.
"""

from __future__ import annotations

from collections.abc import Iterable

from recalkv_vllm.cost.cpu import cpu_dense_token_seconds, cpu_token_seconds
from recalkv_vllm.cost.devices import Device, Gpu
from recalkv_vllm.cost.gpu import gpu_token_seconds, memory_seconds
from recalkv_vllm.cost.layer import LayerCost

#: What times are compared at: tokens of a sequence, and sequences.
CONTEXT = 32768
SEQUENCES = 8


def decode_seconds(layer: LayerCost, device: Device) -> float:
    """Of one step of one layer; its factors are read once."""
    tokens = CONTEXT * SEQUENCES
    if isinstance(device, Gpu):
        factors = memory_seconds(layer.factor_bytes, device)
        return tokens * gpu_token_seconds(layer, device) + factors
    return tokens * cpu_token_seconds(layer, device)


def dense_seconds(layer: LayerCost, device: Device) -> float:
    """Of the same with the dense cache of 16 bits, by the stock kernel; on a GPU it is bound by
    memory."""
    nbytes = 4 * layer.num_kv_heads * layer.head_dim
    if isinstance(device, Gpu):
        per_token = memory_seconds(nbytes, device)
    else:
        per_token = cpu_dense_token_seconds(nbytes, device)
    return CONTEXT * SEQUENCES * per_token


def relative_decode_time(layers: Iterable[LayerCost], device: Device) -> float:
    """Of all layers, as a fraction of the dense cache's."""
    compressed = dense = 0.0
    for layer in layers:
        compressed += decode_seconds(layer, device)
        dense += dense_seconds(layer, device)
    return compressed / dense
