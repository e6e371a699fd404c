"""State of a training that may be interrupted: one file, whole or absent."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from recalkv_vllm.compression.errors import output_errors

#: How often :meth:`StateFile.save` writes.
SECONDS = 60.0
#: What the optimizer keeps of a parameter, besides the step.
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(slots=True)
class HealingState:
    """Steps made, and the parameters that did best on the held-out text, on the CPU.

    Losses are of the held-out text, in nats.
    """

    step: int
    first_loss: float
    best_step: int
    best_loss: float
    best: list[torch.Tensor]

    @classmethod
    def start(cls, parameters: Sequence[nn.Parameter], loss: float) -> HealingState:
        return cls(0, loss, 0, loss, _copies(parameters))

    def keep(self, parameters: Sequence[nn.Parameter], loss: float) -> None:
        """Keep the parameters if they do better than what was kept."""
        if math.isfinite(loss) and loss < self.best_loss:
            self.best_step, self.best_loss, self.best = self.step, loss, _copies(parameters)

    def restore_best(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter, best in zip(parameters, self.best, strict=True):
            parameter.data.copy_(best)


def _copies(parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.detach().to("cpu", copy=True) for parameter in parameters]


class StateFile:
    """Where a training's state is kept until it ends.

    Args:
        path: of the file; its name tells model, text, factors and settings.
    """

    def __init__(self, path: Path):
        self._path = path
        self._saved = time.monotonic()

    def load(
        self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> HealingState | None:
        """Put parameters and optimizer where they were; None if there is nothing to resume."""
        if not self._path.is_file():
            return None
        with safe_open(self._path, framework="pt") as file:
            told = json.loads(file.metadata()["state"])
            best = [file.get_tensor(f"best.{i}") for i in range(len(parameters))]
            for i, parameter in enumerate(parameters):
                parameter.data.copy_(file.get_tensor(f"now.{i}"))
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(told["step"])),
                    **{n: file.get_tensor(f"{n}.{i}").to(parameter.device) for n in MOMENTS},
                }
        return HealingState(best=best, **told)

    def save(
        self,
        state: HealingState,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Write the state, if it was not written lately.

        Raises:
            OutputError: it cannot be written.
        """
        if time.monotonic() - self._saved < SECONDS:
            return
        tensors: dict[str, torch.Tensor] = {}
        for i, parameter in enumerate(parameters):
            tensors |= {f"best.{i}": state.best[i], f"now.{i}": parameter.detach().cpu()}
            tensors |= {f"{n}.{i}": optimizer.state[parameter][n].cpu() for n in MOMENTS}
        names = ("step", "first_loss", "best_step", "best_loss")
        told = {name: getattr(state, name) for name in names}
        partial = self._path.with_suffix(".partial")
        with output_errors(f"state of healing {self._path}"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata={"state": json.dumps(told)})
            partial.replace(self._path)
        self._saved = time.monotonic()

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
