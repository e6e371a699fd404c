"""Dense tiles of keys and values: when they pay, and launch parameters of making them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from recalkv_vllm.kernels.heuristics.choice import attention_config
from recalkv_vllm.kernels.heuristics.shapes import AttentionShape
from recalkv_vllm.kernels.heuristics.targets import NARROW_MMA, Target

#: Query blocks of a sequence from which on a dense copy is made first. Attention on latents rotates
#: and reconstructs, and dequantizes, every key once per block; the copy costs that once, the
#: same for values, and a trip through memory. Reasoned, not timed.
WORTHWHILE_BLOCKS = 4
#: Queries of a long prompt's part, as launch parameters know it.
MANY_QUERIES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconstructionConfig:
    """Parameters of ``reconstruction.py`` and ``key_scales.py``.

    Args:
        tile: tokens of a program.
        stream: columns of latents and factor that are read at a time.
    """

    tile: int
    stream: int
    warps: int = 8
    stages: int = 3


@cache
def reconstruction_config(
    dim: int, itemsize: int, k_width: int, bands: bool, target: Target
) -> ReconstructionConfig:
    """For heads padded to ``dim``: of an accumulator of ``tile · dim``, a thread has up to 32."""
    if itemsize == 4:  # without tensor cores operands are registers
        return ReconstructionConfig(tile=32, stream=16, stages=1)
    # 64 bytes of addresses spilled on sm_80 with 64 columns of a joint span of 192 in bands.
    widest = 32 if bands and target.family in NARROW_MMA else 64
    return ReconstructionConfig(
        tile=64 if dim <= 128 else 32,
        # 8 bytes spilled on sm_80 with all of such keys of larger heads at once.
        stream=16 if k_width <= 32 and dim > 64 else widest,
        warps=4 if dim <= 64 else 8,
    )


def prefers_dense(shape: AttentionShape, target: Target, queries: float) -> bool:
    """Whether sequences of so many queries each, on average, are better attended as dense keys."""
    config = attention_config(shape, target, MANY_QUERIES)
    return queries >= WORTHWHILE_BLOCKS * config.query_block
