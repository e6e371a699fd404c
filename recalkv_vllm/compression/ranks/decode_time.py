"""Time that attention takes to decode, against the dense cache: a roofline of each layer.

Per cached token a layer reads ``B`` bytes and spends ``F`` FLOP, which takes ``max(B, F / ridge)``
in the unit of reading a byte. ``ridge`` is the FLOP that kernels do while memory gives them a byte:

* dense, 16 bits: ``B = 4 · h_kv · d``, ``F = 4 · h_q · d`` (scores, and sums of values);
* compressed: ``B`` as the latent is stored, ``F = 2 · w_k · h_kv · d`` to reconstruct keys and
  ``2 · h_q · (d + w_v)`` for scores and sums of value latents.

Unpacking of codes, launches, and what runs beside attention are not in it.
"""

from __future__ import annotations

from recalkv_vllm.band_format import token_bytes
from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.plan import ModelPlan
from recalkv_vllm.compression.ranks.targets import flop_per_byte

#: FLOP per byte, of attention kernels, by target. H100 and A100 (80 GB): two thirds of the peak
#: matrix rate over that of memory, 990 TFLOP/s over 3.35 TB/s and 312 over 2.04; not measured. CPU:
#: from times against vLLM's kernel (docs/performance.md), which it gives within a tenth; with AMX
#: four times that, not measured.
RIDGES = {"h100": 200.0, "a100": 102.0, "cpu-amx": 128.0, "cpu": 32.0}


def ridge_of(target: str) -> float:
    """Of a target as :func:`chosen_target` gives it; a number is taken for the ridge itself, and
    ``none`` has none: infinite.

    Raises:
        InputError: neither a known name nor a positive number.
    """
    return RIDGES[target] if target in RIDGES else flop_per_byte(target)


def relative_decode_time(plan: ModelPlan, geometry: AttentionGeometry, ridge: float) -> float:
    """Time of all layers' attention over a long context, as a fraction of the dense cache's.

    Args:
        plan: of the compressed cache; plain elements have 16 bits.
        geometry: of the model.
        ridge: FLOP per byte, finite.
    """
    h_q, d = geometry.num_heads, geometry.head_dim
    dense = max(2 * geometry.dense_width, 4 * h_q * d / ridge)
    compressed = 0.0
    for layer, layout in enumerate(plan.layouts):
        read = token_bytes(plan.latent_format(layer), layout.rank, 2)
        flop = layout.reconstruct_flop(geometry) + 2 * h_q * (d + layout.v_width)
        compressed += max(read, flop / ridge)
    return compressed / (dense * geometry.num_layers)
