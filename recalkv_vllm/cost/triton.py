"""What the Triton kernel spends on a cached token, as its launch rules would run it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from recalkv_vllm.cost.kernel import Spent
from recalkv_vllm.cost.layer import LayerCost
from recalkv_vllm.kernels import heuristics
from recalkv_vllm.kernels.columns import next_power_of_2
from recalkv_vllm.kernels.heuristics.shapes import tile_columns


@dataclass(frozen=True, slots=True)
class Instructions:
    """Warp instructions of a program's loop per cached token.

    Args:
        fixed: whatever the sizes.
        per_dim: for each element of each head's key.
        per_column: for each column of a K span, for each head, and of the V block.
    """

    fixed: float
    per_dim: float
    per_column: float


#: By family of architectures, tokens of a tile, and whether latents are codes: least squares over
#: the loops of compiled kernels, which ``python -m recalkv_vllm.benchmarks.instruction_counts``
#: counts and fits again. Each count of :data:`TRITON` is within :data:`TOLERANCE`.
COUNTED = {
    (8, 32, False): Instructions(81.0, 1.262, 0.079),
    (8, 32, True): Instructions(146.2, 2.074, 0.352),
    (8, 64, False): Instructions(13.3, 0.344, 0.108),
    (8, 64, True): Instructions(24.6, 0.739, 0.509),
    (9, 32, False): Instructions(0.0, 0.945, 0.274),
    (9, 32, True): Instructions(170.9, 2.289, 0.197),
    (9, 64, False): Instructions(19.6, 0.123, 0.075),
    (9, 64, True): Instructions(30.0, 0.312, 0.407),
    (10, 32, False): Instructions(0.0, 0.488, 0.373),
    (10, 32, True): Instructions(0.0, 0.156, 0.780),
    (10, 64, False): Instructions(80.3, 0.0, 0.129),
    (10, 64, True): Instructions(64.4, 0.176, 0.283),
}
TRITON = "3.7.1"
TOLERANCE = 0.3
#: Bytes of an element of latents, factors and queries, once they are multiplied.
ITEM = 2


def triton_spends(layer: LayerCost, arch: int) -> Spent | None:
    """None where no launch rule fits, or no kernel was counted on the architecture."""
    return _spent(launch_shape(layer, arch), arch, layer.queries)


@cache
def _spent(shape: heuristics.AttentionShape, arch: int, queries: int) -> Spent | None:
    # Multiprocessors only decide pieces.
    target = heuristics.Target(arch, num_sms=1)
    try:
        config = heuristics.attention_config(shape, target, queries)
    except ValueError:
        return None
    counted = COUNTED.get((target.family, config.tile, shape.code_bits is not None))
    if counted is None:
        return None
    programs = shape.num_kv_heads // config.heads * (shape.v_width // config.v_block)
    return Spent(
        "triton",
        programs * tensor_flop(shape, config, arch),
        programs * shared_bytes(shape, config, arch),
        programs * instructions(counted, shape, config),
    )


def launch_shape(layer: LayerCost, arch: int) -> heuristics.AttentionShape:
    """What launch rules are asked for: tables of cosines as models have them, no bias, no norm."""
    k_width, shared = layer.k_width, layer.shared
    nested = shared == k_width and layer.k_group_size == layer.v_group_size and not layer.bands
    target = heuristics.Target(arch, num_sms=1)
    if nested and heuristics.prefers_whole_spans(k_width, layer.v_width, target):
        k_width = shared = layer.v_width
    return heuristics.AttentionShape(
        queries_per_kv=layer.num_heads // layer.num_kv_heads,
        num_kv_heads=layer.num_kv_heads,
        k_group_size=layer.k_group_size,
        heads_per_v=layer.v_group_size,
        dim=next_power_of_2(layer.head_dim),
        k_width=k_width,
        v_width=layer.v_width,
        itemsize=ITEM,
        shared_columns=shared,
        local_rope=True,
        rope=True,
        key_bias=False,
        key_norm=False,
        code_bits=layer.code_bits,
        bands=layer.bands,
    )


def instructions(
    counted: Instructions,
    shape: heuristics.AttentionShape,
    config: heuristics.AttentionConfig,
) -> float:
    """Of a program per cached token."""
    columns = config.heads * shape.k_width + config.v_block
    per_dim = counted.per_dim * config.heads * shape.dim
    return counted.fixed + per_dim + counted.per_column * columns


def replicas(config: heuristics.AttentionConfig, arch: int) -> float:
    """How often each product is computed: tokens are the M side, of which ``wgmma`` has 64 for four
    warps and ``mma.sync`` 16 for each, and all that remain compute the same."""
    family = heuristics.Target(arch, num_sms=1).family
    if family not in heuristics.WIDE_MMA or config.tile < 64:
        return 16 * config.warps / config.tile
    return config.warps / 4 if family == 9 else 1.0


def tensor_flop(
    shape: heuristics.AttentionShape, config: heuristics.AttentionConfig, arch: int
) -> float:
    """Of a program per cached token: keys, scores of all rows for each head, and values."""
    keys = config.heads * shape.dim * (shape.k_width + config.rows)
    return 2 * replicas(config, arch) * (keys + config.rows * config.v_block)


def shared_bytes(
    shape: heuristics.AttentionShape, config: heuristics.AttentionConfig, arch: int
) -> float:
    """Of a program per cached token: latents and probabilities written, operands read.

    ``wgmma`` and ``tcgen05`` read a factor once for 64 tokens, ``mma.sync`` by every warp.
    """
    heads, rows, times = config.heads, config.rows, replicas(config, arch)
    wide = heuristics.Target(arch, num_sms=1).family in heuristics.WIDE_MMA and config.tile >= 64
    factor = (times if wide else config.warps) * heads * shape.dim * (shape.k_width + rows)
    operands = times * (heads * shape.k_width + config.v_block)
    rotation = 0 if config.local_rope else 2 * shape.dim
    latents = tile_columns(shape, config)
    return ITEM * (factor / config.tile + latents + operands + rotation + 2 * rows)
