"""Whether CUDA C++ or Triton decodes a layer: the faster one, by measured or predicted time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache

import torch

from recalkv_vllm.ops.cuda.identity import identity
from recalkv_vllm.ops.cuda.times import decode_times
from recalkv_vllm.ops.cuda.timing import timer_of

logger = logging.getLogger("recalkv_vllm.ops")

NAMES = {"cuda": "CUDA C++", "triton": "Triton"}


def choose(
    device: torch.device,
    predicted: bool,
    calls: Callable[[], Mapping[str, Callable[[], object]]],
    what: str,
    **parts: object,
) -> bool:
    """Whether CUDA C++ is the faster one on a device, which the log says once.

    Ranks of one model choose for themselves. They may differ: both kernels compute the same, but
    for rounding.

    Args:
        predicted: what the cost model says, for a device that cannot be asked.
        calls: makes a decode by each kernel, to be timed.
        what: is decoded, for the log.
        parts: all that times depend on besides device and versions.
    """
    timer, times = timer_of(device), None
    why = "predicted; the device cannot be asked now"
    if timer is not None:
        try:
            times = decode_times(identity(device, **parts), timer, calls)
        except torch.OutOfMemoryError:
            why = "predicted; there was no memory to measure in"
    by_cuda = predicted
    if times is not None:
        by_cuda = times["cuda"] <= times["triton"]
        measured = ", ".join(f"{NAMES[kernel]} {t:.3f} ms" for kernel, t in times.items())
        why = f"measured: {measured}"
    _log_once(what, NAMES["cuda" if by_cuda else "triton"], why)
    return by_cuda


@cache
def _log_once(what: str, chosen: str, why: str) -> None:
    logger.info("recalkv: decode of %s: %s (%s)", what, chosen, why)
