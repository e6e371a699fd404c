"""Kernels are compiled before the first request: it would wait a second for each of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

logger = logging.getLogger(__name__)


def warm_up(layers: Iterable[Any]) -> None:
    """Run every kernel that ``layers`` can reach once, and say how long it took.

    Layers alike share what is compiled for the first of them. On a CPU there is nothing to do.

    Args:
        layers: :class:`.layer.LatentAttention` with their caches bound.
    """
    began = time.perf_counter()
    launches = sum(layer.impl.warm_up(layer.kv_cache) for layer in layers)
    if launches:
        logger.info(
            "recalkv: kernels are compiled: %d launches in %.1f s",
            launches,
            time.perf_counter() - began,
        )
