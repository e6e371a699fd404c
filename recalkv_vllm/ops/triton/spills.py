"""Launch parameters with which the compiler at hand spills no registers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable
from functools import cache
from typing import Generic, TypeVar

from recalkv_vllm.ops.triton.launch import INTERPRETED, Launch

Config = TypeVar("Config")
LOGGER = logging.getLogger(__name__)


class SpillFree(Generic[Config]):
    """Chooses parameters for the launches of one layer, each once.

    What is asked for after warm-up was chosen there, so that nothing is compiled for it.
    """

    def __init__(self) -> None:
        self._chosen: dict[Hashable, Config] = {}

    def launch(
        self, key: Hashable, configs: Iterable[Config], make: Callable[[Config], Launch]
    ) -> Launch:
        """The launch with the first of ``configs`` that does not spill, else the one that spills
        least.

        Args:
            key: tells apart what kernels are compiled for, besides the configuration.
            make: the launch that a configuration gives.
        """
        if key not in self._chosen:
            self._chosen[key] = _choose(configs, make)
        return make(self._chosen[key])


def _choose(configs: Iterable[Config], make: Callable[[Config], Launch]) -> Config:
    spilling: dict[int, Config] = {}
    for config in configs:
        spills = 0 if INTERPRETED else make(config).spills()
        if not spills:
            return config
        spilling.setdefault(spills, config)
    least = min(spilling)
    _warn(f"{least} registers spilled with {spilling[least]}")
    return spilling[least]


@cache
def _warn(message: str) -> None:
    """Once, not for every layer."""
    LOGGER.warning(message)
