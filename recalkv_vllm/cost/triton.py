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


#: By family of architectures, tokens of a tile, and whether latents are codes. Fitted to the loops
#: that ``python -m recalkv_vllm.benchmarks.instruction_counts`` reads off compiled kernels, which
#: they give to within 30 %, and those of one head and 64 tokens mostly to within 15 %.
COUNTED = {
    (9, 64, False): Instructions(21.7, 0.097, 0.076),
    (9, 64, True): Instructions(32.5, 0.294, 0.444),
    (9, 32, False): Instructions(0.0, 0.891, 0.279),
    (9, 32, True): Instructions(63.5, 3.554, 0.275),
    (8, 64, False): Instructions(0.0, 0.421, 0.119),
    (8, 64, True): Instructions(0.0, 0.964, 0.584),
    (8, 32, False): Instructions(0.0, 1.775, 0.111),
    (8, 32, True): Instructions(0.0, 3.212, 0.499),
}


#: Bytes of an element of latents, factors and queries, once they are multiplied.
ITEM = 2


def triton_spends(layer: LayerCost, arch: int) -> Spent | None:
    """None where no launch rule fits, or no kernel was counted on the architecture."""
    return _spent(launch_shape(layer), arch, layer.queries)


@cache
def _spent(shape: heuristics.AttentionShape, arch: int, queries: int) -> Spent | None:
    # Multiprocessors only decide splits.
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
        programs * tensor_flop(shape, config),
        programs * shared_bytes(shape, config, arch),
        programs * instructions(counted, shape, config, shape.k_width),
    )


def launch_shape(layer: LayerCost) -> heuristics.AttentionShape:
    """What launch rules are asked for: tables of cosines as models have them, no bias, no norm."""
    return heuristics.AttentionShape(
        queries_per_kv=layer.num_heads // layer.num_kv_heads,
        num_kv_heads=layer.num_kv_heads,
        k_group_size=layer.k_group_size,
        heads_per_v=layer.v_group_size,
        dim=next_power_of_2(layer.head_dim),
        k_width=layer.k_width,
        v_width=layer.v_width,
        itemsize=ITEM,
        shared_columns=layer.shared,
        local_rope=True,
        rope=True,
        key_bias=False,
        key_norm=False,
        code_bits=layer.code_bits,
        bands=layer.coded,
    )


def instructions(
    counted: Instructions,
    shape: heuristics.AttentionShape,
    config: heuristics.AttentionConfig,
    k_width: int,
) -> float:
    """Of a program per cached token, with keys from ``k_width`` columns."""
    columns = config.heads * k_width + config.v_block
    per_dim = counted.per_dim * config.heads * shape.dim
    return counted.fixed + per_dim + counted.per_column * columns


def tensor_flop(shape: heuristics.AttentionShape, config: heuristics.AttentionConfig) -> float:
    """Of a program per cached token: keys, scores of all rows for each head, and values."""
    keys = config.heads * shape.dim * (shape.k_width + config.rows)
    return 2 * (keys + config.rows * config.v_block)


def shared_bytes(
    shape: heuristics.AttentionShape, config: heuristics.AttentionConfig, arch: int
) -> float:
    """Of a program per cached token: latents and probabilities written, operands read.

    ``wgmma`` and ``tcgen05`` read a factor once per tile; ``mma.sync`` once per 16 tokens, and
    latents by every warp beside these.
    """
    heads, rows = config.heads, config.rows
    tokens_side = config.tile // 16
    wide = heuristics.Target(arch, 1).family in heuristics.WIDE_MMA and config.tile >= 64
    factor_reads, latent_reads = (1, 1) if wide else (tokens_side, config.warps / tokens_side)
    factors = heads * shape.dim * (factor_reads * shape.k_width + rows) / config.tile
    latents = tile_columns(shape, config) + latent_reads * heads * shape.k_width + config.v_block
    rotation = 0 if config.local_rope else 2 * shape.dim
    return ITEM * (factors + latents + rotation + 2 * rows)
