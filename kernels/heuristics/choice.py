"""Choice of launch parameters: the least work among the rules that fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product

from recalkv_vllm.kernels.columns import next_power_of_2
from recalkv_vllm.kernels.heuristics.rules import RULES, Rule, ragged, spill_free
from recalkv_vllm.kernels.heuristics.shapes import (
    AttentionConfig,
    AttentionShape,
    head_counts,
    shared_memory,
    streamed_columns,
    tile_columns,
    value_block,
)
from recalkv_vllm.kernels.heuristics.targets import (
    HOPPER,
    INTERPRETER,
    NARROW_MMA,
    WIDE_MMA,
    Target,
)

#: Query rows of one program in prefill: each reconstructed key serves them all.
PREFILL_ROWS = 64


def query_lengths() -> list[int]:
    """Usual query lengths that :func:`attention_config` tells apart, of the powers of two.

    No program has more query rows than :data:`PREFILL_ROWS`.
    """
    return [2**i for i in range(PREFILL_ROWS.bit_length())]


@cache
def attention_config(shape: AttentionShape, target: Target, queries: int) -> AttentionConfig:
    """Launch parameters for blocks of up to ``queries`` queries per sequence.

    Prefers little work, then many heads per program (latents are read less often), then the order
    of :data:`.rules.RULES`; prefetches deeper while two programs still fit on a multiprocessor.

    Raises:
        ValueError: no rule fits.
    """
    if target is INTERPRETER:
        heads, v_block = next(head_counts(shape)), value_block(shape.v_width, 256)
        return _config(shape, RULES[0], heads, v_block, queries, PREFILL_ROWS)
    candidates = sorted(_candidates(shape, target, queries), key=lambda each: work(shape, each[0]))
    for config, rule in candidates:
        fits = shared_memory(shape, config, target) <= target.shared_bytes
        if fits and spill_free(shape, config, rule, target):
            return _prefetching(shape, config, target)
    raise ValueError(f"no launch parameters for sm_{target.arch} fit {shape}")


def work(shape: AttentionShape, config: AttentionConfig) -> float:
    """FLOP / 2 per token and query row: every block of value columns needs the keys and scores.

    A streamed factor is read from L2 once per tile, which at 32 tokens is 32 FLOP per byte: it
    counts as four times the work.
    """
    rows = config.query_block * shape.queries_per_kv
    reconstruction = shape.k_width * shape.dim / rows * (4 if config.stream else 1)
    return shape.v_width / config.v_block * (reconstruction + shape.dim) + shape.v_width


def _candidates(
    shape: AttentionShape, target: Target, queries: int
) -> Iterator[tuple[AttentionConfig, Rule]]:
    rules = [
        rule
        for rule in RULES
        if target.family in rule.families and (shape.local_rope or not rule.local_rope)
    ]
    v_blocks = dict.fromkeys(value_block(shape.v_width, n) for n in (512, 256, 128, 64, 32, 16))
    most_rows = (PREFILL_ROWS, 32, 16)
    for rows, v_block, heads, rule in product(most_rows, v_blocks, head_counts(shape), rules):
        yield _config(shape, rule, heads, v_block, queries, rows), rule


def _config(
    shape: AttentionShape, rule: Rule, heads: int, v_block: int, queries: int, most_rows: int
) -> AttentionConfig:
    per_query = heads * shape.queries_per_kv
    query_block = max(1, min(queries, most_rows // per_query))
    return AttentionConfig(
        heads=heads,
        v_block=v_block,
        query_block=query_block,
        rows=max(16, next_power_of_2(query_block * per_query)),
        tile=rule.tile,
        local_rope=rule.local_rope and shape.local_rope,
        stream=streamed_columns(shape) if rule.stream else 0,
        late_values=False,
        # Twice the registers, for codes, scales and elements of a tile while it is dequantized.
        warps=rule.warps if shape.code_bits is None else 8,
        stages=3,
    )


def _prefetching(shape: AttentionShape, config: AttentionConfig, target: Target) -> AttentionConfig:
    """The same with more stages, if there is shared memory and there are registers for them.

    With fewer, if there are none even for three.
    """
    columns = tile_columns(shape, config)
    # Up to 144 bytes of the addresses of several bands spilled on sm_90.
    if shape.bands and (config.stream or (shape.code_bits == 8 and columns > 128)):
        return replace(config, stages=1)
    # 8 bytes spilled on sm_80 by one of the blocks of 256 value columns beside keys of 96.
    several = config.query_block > 1 and target.family in NARROW_MMA
    if shape.bands and several and columns > 320:
        return replace(config, stages=1)
    # 8 bytes spilled on sm_90 with three, and up to 32 on sm_100.
    if config.stream and shape.key_norm and target.family in WIDE_MMA:
        return replace(config, stages=2)
    if config.rows == PREFILL_ROWS and shape.key_bias and target.family in HOPPER:
        return replace(config, stages=2)
    # With three stages, or five on sm_80, ptxas makes room for one more program and spills 8 bytes.
    narrow = config.v_block <= 48 and (config.tile, config.rows) == (32, 32)
    uncoded = shape.code_bits is None
    if narrow and shape.dim <= 64 and uncoded and target.family in NARROW_MMA:
        return replace(config, stages=2)
    deeper = replace(config, stages=5)
    roomy = 2 * shared_memory(shape, deeper, target) <= target.shared_bytes
    # With more rows, heads or chunks the addresses of several tiles would spill, and with several
    # queries those beside the norm's scales and the tile-local rotation's table.
    scaled = shape.key_norm and config.local_rope and config.query_block > 1
    light = (
        config.rows == 16
        and config.heads == 1
        and columns <= 256
        and uncoded
        and (config.warps == 8 or not ragged(config.v_block))
        and not (scaled and target.family in HOPPER)
    )
    crowded = narrow and config.warps == 4 and (shape.key_norm or shape.dim <= 64)
    return deeper if roomy and (light or (crowded and target.family in HOPPER)) else config
