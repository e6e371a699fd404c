"""Faults of a checkpoint, each in one line that names it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names file, field, expected and found."""


def require(condition: bool, message: str) -> None:
    """Raise :class:`CheckpointError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise CheckpointError(message)


def brief(value: Any) -> str:
    """``repr`` of anything, on one line and not long."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer of more digits than Python prints
        return f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_int(value: Any) -> bool:
    """Whether JSON's value is an integer; Python counts booleans as such."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_keys(cls: type, raw: Any, where: str) -> None:
    """Raise :class:`CheckpointError` unless ``raw`` has exactly the fields of dataclass ``cls``."""
    require(isinstance(raw, Mapping), f"{where}: expected an object, found {brief(raw)}")
    expected = {f.name for f in fields(cls)}
    if missing := sorted(expected - set(raw)):
        raise CheckpointError(f"{where}: {', '.join(missing)} missing")
    if unknown := sorted(set(raw) - expected):
        raise CheckpointError(f"{where}: unknown {', '.join(unknown)}")
