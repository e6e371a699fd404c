"""Other parameters of the same launch, for a kernel that spills registers with them.

Rules tell what compiled well at some geometries, with one compiler. Others may lie elsewhere,
and a compiler may be another; so whoever launches asks for these, one after the other, until one
compiles without spills. The grid, and what a program computes, stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import TypeVar

from recalkv_vllm.kernels.heuristics.reconstruction import ReconstructionConfig
from recalkv_vllm.kernels.heuristics.shapes import (
    AttentionConfig,
    AttentionShape,
    shared_memory,
    streamed_columns,
)
from recalkv_vllm.kernels.heuristics.targets import Target

#: Of a streamed factor at a time: what a matrix product takes.
LEAST_COLUMNS = 16
Config = TypeVar("Config", AttentionConfig, ReconstructionConfig)


def leaner_attention(
    shape: AttentionShape, config: AttentionConfig, target: Target
) -> Iterator[AttentionConfig]:
    """``config``, then fewer tiles at once, rotations per token, a factor streamed from L2, and
    values loaded after it.

    With one tile at once none is fetched ahead. Then less shared memory is taken, so that another
    program of the multiprocessor can compute meanwhile.
    """
    streams = [config.stream]
    if config.heads == 1:
        streams += [streamed_columns(shape), LEAST_COLUMNS]
    for leaner in _leaner(config, list(dict.fromkeys(streams))):
        if leaner == config or shared_memory(shape, leaner, target) <= target.shared_bytes:
            yield leaner


def _leaner(config: AttentionConfig, streams: list[int]) -> Iterator[AttentionConfig]:
    rotations = dict.fromkeys((config.local_rope, False))
    for stream, local_rope in product(streams, rotations):
        yield from _fewer_stages(replace(config, stream=stream, local_rope=local_rope))
    for stream in filter(None, streams):
        yield replace(config, stream=stream, local_rope=False, late_values=True, stages=1)


def leaner_reconstruction(config: ReconstructionConfig) -> Iterator[ReconstructionConfig]:
    """``config``, then fewer columns ahead, twice as many warps, and half as many columns."""
    yield from _fewer_stages(config)
    if config.warps < 8:
        yield from _fewer_stages(replace(config, warps=8))
    if config.stream > LEAST_COLUMNS:
        yield from _fewer_stages(replace(config, stream=config.stream // 2))


def _fewer_stages(config: Config) -> Iterator[Config]:
    yield config
    yield from (replace(config, stages=n) for n in (3, 2, 1) if n < config.stages)
