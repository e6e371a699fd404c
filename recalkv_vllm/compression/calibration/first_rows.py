"""Inputs and gradients of the first samples, which the pass looks at twice or three times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from recalkv_vllm.compression.errors import output_errors

#: ``x: [tokens, H]`` and ``g: [tokens, 2 · h_kv · d]`` of a sample, layer after layer.
Rows = Iterator[tuple[torch.Tensor, torch.Tensor]]


class FirstRows:
    """Rows of samples by index: kept on disk, or measured again every time.

    Args:
        measure: runs the model on a sample; rows of all layers.
        directory: where to keep them, made when needed; None keeps none.
    """

    def __init__(
        self,
        measure: Callable[[int], list[tuple[torch.Tensor, torch.Tensor]]],
        directory: Path | None,
    ):
        self._measure, self._directory = measure, directory
        self._kept: set[int] = set()

    def __contains__(self, index: int) -> bool:
        """Whether a sample needs no measuring."""
        return index in self._kept

    def __call__(self, index: int) -> Rows:
        """Rows of a sample. What is in memory of a layer is dropped before the next.

        Raises:
            OutputError: they cannot be kept.
        """
        if index not in self._kept:
            rows = self._measure(index)
            if self._directory is None:
                return _dropping(rows)
            with output_errors(f"calibration statistics {self._directory} (in RECALKV_CACHE)"):
                self._directory.mkdir(exist_ok=True)
                save_file(_named(rows), self._path(index))
            self._kept.add(index)
        return _read(self._path(index))

    def _path(self, index: int) -> Path:
        assert self._directory is not None
        return self._directory / f"{index}.safetensors"


def _dropping(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> Rows:
    rows.reverse()
    while rows:
        yield rows.pop()


def _named(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {
        f"{name}{layer}": part.contiguous()
        for layer, parts in enumerate(rows)
        for name, part in zip("xg", parts, strict=True)
    }


def _read(path: Path) -> Rows:
    with safe_open(path, "pt") as file:
        for layer in range(len(file.keys()) // 2):
            yield file.get_tensor(f"x{layer}"), file.get_tensor(f"g{layer}")
