"""What compression needs to know of a format of quantized weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

#: Projections that are written dense into a compressed checkpoint.
DENSE = ("k_proj", "v_proj")


class WeightFormat(ABC):
    """A format, with the ``quantization_config`` of one model.

    Raises:
        InputError: settings that no dense form is known of.
    """

    def __init__(self, settings: Mapping[str, Any]):
        self.settings = settings

    @abstractmethod
    def dense(
        self, directory: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """Dense weights in place of quantized ones, by float32 arithmetic; other tensors as is.

        Args:
            directory: of the model.
            tensors: all of the model's; emptied on the way, so that both forms of the whole model
                are never held.
            dtype: of the dense weights.

        Raises:
            KeyError, ValueError: tensors that do not fit the format.
        """

    @abstractmethod
    def with_dense_kv(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The ``quantization_config`` of the same model with key and value projections dense.

        Args:
            shapes: of all tensors of the quantized model, by name.
        """


def module_of(name: str) -> str:
    """A tensor's module: its name without the last part."""
    return name.rpartition(".")[0]


def float_scales(tensors: dict[str, torch.Tensor], suffix: str) -> None:
    """Make 16-bit scales float32, in place: they then multiply without rounding."""
    for name, tensor in tensors.items():
        if name.endswith(suffix) and tensor.dtype in (torch.float16, torch.bfloat16):
            tensors[name] = tensor.float()
