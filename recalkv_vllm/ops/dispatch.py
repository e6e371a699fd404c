"""Picks the implementation of the ops by device, dtype and head size.

``RECALKV_KERNEL=reference|cpu|triton|cuda`` forces one; a forced one that cannot run is an error
that says why, never a fallback.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from typing import cast

import torch

from recalkv_vllm.ops.contract import Implementation, KernelUnavailableError

logger = logging.getLogger("recalkv_vllm.ops")

MODULES = {name: f"{__package__}.{name}" for name in ("reference", "cpu", "triton", "cuda")}
#: Tried in order when nothing is forced. The reference is never picked silently: it is slow. Triton
#: decodes layers bound by ``cuda`` where it is faster (``ops/cuda/choice.py``).
PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def implementation(
    device: torch.device, dtype: torch.dtype, head_dim: int | None = None
) -> Implementation:
    """The implementation that runs on ``device`` with ``dtype`` (and heads of ``head_dim``).

    Raises:
        KernelUnavailableError: naming every implementation tried and why it cannot run.
    """
    return _choose(os.environ.get("RECALKV_KERNEL"), device, dtype, head_dim)


def candidates(device_type: str) -> tuple[str, ...]:
    """Implementations that are tried on a type of device, in order; none if what forces one is no
    name of any."""
    forced = os.environ.get("RECALKV_KERNEL")
    if forced is None:
        return PREFERENCE.get(device_type, ())
    return (forced,) if forced in MODULES else ()


def look_up(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int | None = None
) -> tuple[Implementation | None, str | None]:
    """The implementation of a name in :data:`MODULES` if it runs there, else why it does not."""
    try:
        module = cast(Implementation, importlib.import_module(MODULES[name]))
    except ImportError as error:
        return None, f"cannot be imported ({error})"
    reason = module.unsupported_reason(device, dtype, head_dim)
    return (module, None) if reason is None else (None, reason)


@functools.cache
def _choose(
    forced: str | None, device: torch.device, dtype: torch.dtype, head_dim: int | None
) -> Implementation:
    if forced is not None and forced not in MODULES:
        raise KernelUnavailableError(
            f"RECALKV_KERNEL: expected one of {', '.join(MODULES)}, found {forced!r}"
        )
    reasons: dict[str, str] = {}
    for name in (forced,) if forced else PREFERENCE.get(device.type, ()):
        module, reason = look_up(name, device, dtype, head_dim)
        if module is not None:
            why = f"RECALKV_KERNEL={forced}" if forced else "first that runs here"
            if reasons:
                why += "; " + "; ".join(f"not {n}: {r}" for n, r in reasons.items())
            _log_once(name, module.describe(device, dtype), str(device), str(dtype), why)
            return module
        assert reason is not None
        reasons[name] = reason
    what = f"{str(dtype).removeprefix('torch.')} on {device}"
    if head_dim is not None:
        what += f" with head size {head_dim}"
    found = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    prefix = f"RECALKV_KERNEL={forced}: " if forced else ""
    raise KernelUnavailableError(f"{prefix}no kernel for {what}: {found or 'unknown device'}")


@functools.cache
def _log_once(name: str, description: str, device: str, dtype: str, why: str) -> None:
    logger.info(
        "recalkv kernels for %s on %s: %s, %s (%s)",
        dtype.removeprefix("torch."),
        device,
        name,
        description,
        why,
    )
