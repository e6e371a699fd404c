"""What the options of ``recalkv bench kernel`` may be, and which combinations are measured."""

from __future__ import annotations

import argparse

import torch

from recalkv_vllm.compression.errors import InputError

from .geometries import GEOMETRIES, Geometry

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def geometries(names: list[str]) -> list[Geometry]:
    """Geometries by name, or all.

    Raises:
        InputError: an unknown name.
    """
    if names == ["all"]:
        return list(GEOMETRIES.values())
    for name in names:
        if name not in GEOMETRIES:
            raise InputError(
                f"--geometry: expected all or some of {', '.join(GEOMETRIES)}, found {name!r}"
            )
    return [GEOMETRIES[name] for name in names]


def skip_reason(
    geometry: Geometry,
    compression: float,
    group_size: int,
    context: int,
    batch: int,
    options: argparse.Namespace,
    largest_cache_bytes: int,
) -> str | None:
    """Why a combination is not measured, or None.

    Raises:
        InputError: an option that no combination can have.
    """
    if not 0 <= compression < 1:
        raise InputError(f"--compression: expected a number in [0, 1), found {compression}")
    for name, value in (("--group-size", group_size), ("--context", context), ("--batch", batch)):
        if value < 1:
            raise InputError(f"{name}: expected a positive number, found {value}")
    if not 1 <= options.queries <= context:
        raise InputError(f"--queries: expected 1 to the context, found {options.queries}")
    heads = geometry.num_kv_heads
    if heads % group_size:
        return f"{heads} KV heads do not divide into groups of {group_size}"
    size = geometry.cache_bytes(context, batch, DTYPES[options.dtype])
    if size > largest_cache_bytes:
        return f"one layer's uncompressed cache takes {size / 2**30:.0f} GiB"
    return None
