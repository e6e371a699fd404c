"""The engines that run a model for an evaluation; each is loaded only when asked for."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol, cast

from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.names import ENGINES


class Engine(Protocol):
    """Runs models as they are served, in float32 unless told otherwise."""

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


def load_engine(name: str, dtype: str | None = None) -> Engine:
    """Import an engine.

    Args:
        name: of the engine.
        dtype: of weights, activations and unquantized caches, where the engine has a choice (vLLM);
            None for float32.

    Raises:
        InputError: an unknown engine, or one whose libraries are not installed.
    """
    if name not in ENGINES:
        raise InputError(f"engine {name!r}: unknown; expected one of {', '.join(ENGINES)}")
    try:
        module = importlib.import_module(f"recalkv_vllm.evaluation.{name}_engine")
    except ModuleNotFoundError as error:
        raise InputError(f"engine {name}: {error.name} is not installed") from error
    if dtype is None:
        return cast(Engine, module)
    functions = {part: getattr(module, part) for part in ("score_windows", "generate")}
    return cast(
        Engine,
        SimpleNamespace(**{p: functools.partial(f, dtype=dtype) for p, f in functions.items()}),
    )
