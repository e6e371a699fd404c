"""The ops on paged latents: one contract, several implementations, picked by ``dispatch``.

``bind(layer)`` gives an object with the ops of one layer; see :mod:`recalkv_vllm.ops.contract`.
"""

from __future__ import annotations

from recalkv_vllm.ops.checked import CheckedLayer, bind
from recalkv_vllm.ops.contract import (
    Batch,
    BatchLimits,
    KernelUnavailableError,
    LatentLayer,
    Pieces,
)

__all__ = [
    "Batch",
    "BatchLimits",
    "CheckedLayer",
    "KernelUnavailableError",
    "LatentLayer",
    "Pieces",
    "bind",
]
