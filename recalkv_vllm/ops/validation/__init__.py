"""Argument checks of the ops: one clear line before any kernel starts.

Constants are checked once, when a layer is bound; a call checks only what may change, and tensors
that calls share but once. With ``RECALKV_DEBUG=1`` calls also check the values of index tensors,
which on a GPU waits for it.
"""

from recalkv_vllm.ops.validation.calls import (
    check_attend,
    check_batch,
    check_cache,
    check_heads,
    check_reconstruct,
    check_slots,
    check_update,
    check_value_up,
)
from recalkv_vllm.ops.validation.layer import LayerSignature, check_layer

__all__ = [
    "LayerSignature",
    "check_attend",
    "check_batch",
    "check_cache",
    "check_heads",
    "check_layer",
    "check_reconstruct",
    "check_slots",
    "check_update",
    "check_value_up",
]
