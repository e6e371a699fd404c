"""New constants in the place of a bound layer's old ones, where captured graphs read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import torch

_PACKAGE = __name__.partition(".")[0]


def overwrite(old: Any, new: Any, where: str = "layer") -> None:
    """Copy every tensor of ``new`` into the one in the same place of ``old``.

    Both are what :func:`~recalkv_vllm.ops.bind` makes of layers that differ in their tensors'
    elements only. What ``old`` has besides, such as plans made for calls, stays.

    Args:
        where: what they are, for the message.

    Raises:
        ValueError: they differ in anything else; the message names it.
    """
    # All of them first: what is refused changes nothing.
    for there, here in list(_tensors(old, new, where)):
        # One storage in both: a parameter that kernels read as it is.
        if there.data_ptr() != here.data_ptr():
            there.copy_(here)


def _tensors(old: Any, new: Any, where: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of tensors in the same places."""
    if isinstance(new, torch.Tensor):
        if _kind(old) != _kind(new):
            raise ValueError(f"{where}: expected {_kind(old)}, found {_kind(new)}")
        yield old, new
        return
    parts = _parts(new)
    if parts is None:
        if old != new:
            raise ValueError(f"{where}: expected {old}, found {new}")
        return
    there = _parts(old) if type(old) is type(new) else None
    if there is None or not there.keys() >= parts.keys():
        raise ValueError(f"{where}: expected {old}, found {new}")
    for name, part in parts.items():
        yield from _tensors(there[name], part, f"{where}.{name}")


def _kind(x: Any) -> Any:
    """What two tensors must have in common."""
    if not isinstance(x, torch.Tensor):
        return x
    return tuple(x.shape), x.stride(), x.dtype, x.device


def _parts(x: Any) -> Mapping[Any, Any] | None:
    """Named parts of a container or of an object of ours; None for everything else."""
    if isinstance(x, dict):
        return x
    if isinstance(x, tuple | list):
        return dict(enumerate(x))
    if isinstance(x, type | Enum) or not type(x).__module__.startswith(f"{_PACKAGE}."):
        return None
    slots = (name for cls in type(x).__mro__ for name in getattr(cls, "__slots__", ()))
    return {**getattr(x, "__dict__", {}), **{name: getattr(x, name) for name in slots}}
