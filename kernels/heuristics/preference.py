"""Which kernel is expected to decode faster: CUDA C++ for all devices, or Triton's."""

from __future__ import annotations

from recalkv_vllm.kernels.heuristics.choice import attention_config
from recalkv_vllm.kernels.heuristics.shapes import AttentionShape
from recalkv_vllm.kernels.heuristics.targets import WIDE_MMA, Target

#: Tokens of a tile from which on wgmma and tcgen05 reconstruct keys.
WIDE_TILE = 64


def prefers_cuda(shape: AttentionShape, target: Target, queries: int) -> bool:
    """Whether CUDA C++ is expected to, with ``queries`` per sequence at most; asked where neither
    can be timed.

    Its kernel multiplies by ``mma.sync``, whose operands every warp loads into registers, and
    so does Triton up to sm_89 and on sm_120. From sm_90 on, Triton's ``wgmma`` and ``tcgen05`` read
    them from shared memory, which takes fewer instructions per token; but not in the narrow tiles
    of spans too wide for it, where eight warps issue several times as many. They are counted by
    ``python -m recalkv_vllm.benchmarks.compile_report``; no kernel has been timed.
    """
    if target.family not in WIDE_MMA:
        return True
    return attention_config(shape, target, queries).tile < WIDE_TILE
