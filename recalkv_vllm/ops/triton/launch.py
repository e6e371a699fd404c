"""One launch of a Triton kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton

#: Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on CPU tensors.
INTERPRETED = triton.knobs.runtime.interpret


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch: run it, or only compile it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 1

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self._options())

    def compile(self) -> Any:
        """Triton's compiled kernel for the active driver's target; nothing is launched."""
        return self.kernel.warmup(grid=self.grid, **self.arguments, **self._options())

    def spills(self) -> int:
        """Registers of a thread that the compiler keeps in memory; loads the compiled kernel."""
        compiled = self.compile()
        compiled.run  # noqa: B018  # Triton learns it from the driver, when it is first asked to run.
        return compiled.n_spills

    def _options(self) -> dict[str, Any]:
        options = {"num_warps": self.warps, "num_stages": self.stages}
        # Said outright because Triton 3.10 changes the default.
        return options if INTERPRETED else options | {"enable_fp_fusion": True}
