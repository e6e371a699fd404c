"""Launch parameters by architecture and shape: every tuning choice of the kernels is here.

The choices follow from two budgets, registers and shared memory. Both are held against what the
compiler reports by ``python -m recalkv_vllm.benchmarks.compile_report``.
"""

from recalkv_vllm.kernels.heuristics.choice import attention_config, query_lengths
from recalkv_vllm.kernels.heuristics.leaner import leaner_attention, leaner_reconstruction
from recalkv_vllm.kernels.heuristics.pieces import piece_bounds
from recalkv_vllm.kernels.heuristics.preference import prefers_cuda
from recalkv_vllm.kernels.heuristics.reconstruction import (
    ReconstructionConfig,
    prefers_dense,
    reconstruction_config,
)
from recalkv_vllm.kernels.heuristics.shapes import AttentionConfig, AttentionShape, shared_memory
from recalkv_vllm.kernels.heuristics.targets import WIDE_MMA, Target, target_of
from recalkv_vllm.kernels.heuristics.value_up import (
    ValueUpConfig,
    value_up_config,
    value_up_tokens,
)
from recalkv_vllm.kernels.heuristics.whole_spans import prefers_whole_spans

__all__ = [
    "WIDE_MMA",
    "AttentionConfig",
    "AttentionShape",
    "ReconstructionConfig",
    "Target",
    "ValueUpConfig",
    "attention_config",
    "leaner_attention",
    "leaner_reconstruction",
    "piece_bounds",
    "prefers_cuda",
    "prefers_dense",
    "prefers_whole_spans",
    "query_lengths",
    "reconstruction_config",
    "shared_memory",
    "target_of",
    "value_up_config",
    "value_up_tokens",
]
