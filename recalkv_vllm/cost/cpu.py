"""Time of attention on a CPU: memory or arithmetic, whichever is slower.

Per cached token a layer spends ``2 · w_k · h_kv · d`` FLOP to reconstruct keys and
``2 · h_q · (d + w_v)`` for scores and sums of value latents, at the rate of a matrix product:
what the kernel saves by folding slow pairs, and what it does besides, are about even. The unpacking
of codes is not in it.
"""

from __future__ import annotations

from recalkv_vllm.cost.devices import Cpu
from recalkv_vllm.cost.layer import LayerCost


def cpu_token_seconds(layer: LayerCost, cpu: Cpu) -> float:
    """Of a layer per cached token."""
    keys = layer.k_width * layer.num_kv_heads * layer.head_dim
    rows = layer.queries * layer.num_heads * (layer.head_dim + layer.v_width)
    return max(layer.token_bytes / cpu.bytes_per_s, 2 * (keys + rows) / cpu.flop_per_s)


def cpu_dense_token_seconds(nbytes: int, cpu: Cpu) -> float:
    """Of the stock kernel per cached token of ``nbytes``."""
    return nbytes * max(1 / cpu.bytes_per_s, cpu.stock_flop_per_byte / cpu.flop_per_s)
