"""The engines that run a model for an evaluation; each is loaded only when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, cast

from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.names import ENGINES


class Engine(Protocol):
    """A module that runs models in float32, as they are served."""

    @staticmethod
    def score_windows(model: Path, windows: list[list[int]]) -> list[list[float]]:
        """Per window of token ids: the negative log-likelihood (nats) of each token but its
        first."""

    @staticmethod
    def generate(
        model: Path, prompts: list[list[int]], max_tokens: list[int]
    ) -> Iterator[list[int]]:
        """Greedy continuations of prompts in order, as they are made; of each prompt, no more than
        its ``max_tokens`` token ids."""


def load_engine(name: str) -> Engine:
    """Import an engine.

    Raises:
        InputError: an unknown engine, or one whose libraries are not installed.
    """
    if name not in ENGINES:
        raise InputError(f"engine {name!r}: unknown; expected one of {', '.join(ENGINES)}")
    try:
        return cast(Engine, importlib.import_module(f"recalkv_vllm.evaluation.{name}_engine"))
    except ModuleNotFoundError as error:
        raise InputError(f"engine {name}: {error.name} is not installed") from error
