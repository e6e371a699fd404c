"""Options that size a KV cache, and the bytes that they leave for it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from recalkv_vllm.cli.sizes import size

if TYPE_CHECKING:
    from recalkv_vllm.checkpoint import AttentionGeometry, RecalkvConfig

#: Bytes of an element.
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}


def add_memory_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """Add the size of the cache, which may be left out unless ``required``, and what it depends
    on."""
    add = parser.add_argument
    memory = parser.add_mutually_exclusive_group(required=required)
    memory.add_argument(
        "--memory", type=size, metavar="SIZE", help="memory of one device, such as 80GiB"
    )
    memory.add_argument(
        "--kv-cache-memory-bytes",
        type=size,
        metavar="SIZE",
        help="KV-cache size per device, as in vLLM",
    )
    add(
        "--gpu-memory-utilization",
        type=float,
        default=0.92,
        metavar="F",
        help="fraction of --memory to use, as in vLLM",
    )
    add(
        "--overhead",
        type=size,
        default="3GiB",
        metavar="SIZE",
        help="memory per device for activations and graphs; an estimate (vLLM measures it at "
        "start-up)",
    )
    add("--block-size", type=int, default=16, metavar="N", help="tokens per block (CPU: 128)")


def check_countable(geometry: AttentionGeometry, model: str) -> None:
    """Raise :class:`InputError` for a cache that more than tokens take."""
    from recalkv_vllm.compression.errors import InputError

    if geometry.decoder_layers is not None:
        raise InputError(
            f"{model}: expected a model all of whose layers have attention; the states of other "
            "layers take pages of the cache too, whose size vLLM decides: its log says at start-up "
            "how many tokens and requests fit"
        )


def compressed_weight_bytes(
    dense: int, recalkv: RecalkvConfig, geometry: AttentionGeometry, itemsize: int, tp_size: int
) -> int:
    """Bytes per device of the weights with factors, from those of the ``dense`` ones."""
    from recalkv_vllm.serving import capacity

    factors = capacity.factor_bytes(recalkv, geometry, itemsize)
    saved = capacity.projection_bytes(geometry, itemsize)
    return dense + (factors - saved) // tp_size


def kv_cache_bytes(options: argparse.Namespace, weight_bytes: int, tp_size: int) -> int:
    """What a device has left for its cache beside its weights, or was told to use.

    Raises:
        InputError: not enough memory for the weights.
    """
    from recalkv_vllm.compression.errors import InputError

    if options.kv_cache_memory_bytes is not None:
        return options.kv_cache_memory_bytes
    usable = int(options.memory * options.gpu_memory_utilization)
    cache_bytes = usable - weight_bytes - options.overhead
    if cache_bytes <= 0:
        raise InputError(
            f"--memory {options.memory}: expected more than {weight_bytes} bytes of weights and "
            f"{options.overhead} of overhead, found {usable} bytes to use "
            f"({options.gpu_memory_utilization:.0%}) on each of {tp_size} devices"
        )
    return cache_bytes
