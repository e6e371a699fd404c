"""How fast this machine multiplies matrices and reads memory: measured once, and kept."""

from __future__ import annotations

import hashlib
import json
import timeit
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from recalkv_vllm.cache_directory import cache_directory
from recalkv_vllm.compression.errors import output_errors

#: Matrices of the product that is timed: a tile's keys are as narrow.
PRODUCT = (4096, 128, 128)
#: Floats that are read: 256 MiB, more than caches hold.
ELEMENTS = 1 << 26
REPEATS = 20


@dataclass(frozen=True, slots=True)
class CpuRates:
    """Of all threads that torch uses.

    Args:
        flop_per_s: of bf16 matrix products.
        bytes_per_s: read from memory.
    """

    flop_per_s: float
    bytes_per_s: float

    @property
    def flop_per_byte(self) -> float:
        """FLOP of matrix products in the time that memory takes for a byte."""
        return self.flop_per_s / self.bytes_per_s


def cpu_rates() -> CpuRates:
    """This machine's rates: measured in a second the first time, then read from the cache.

    Raises:
        OutputError: the cache directory cannot be written.
    """
    path = cache_directory() / f"cpu-rates-{_machine()}.json"
    try:
        return CpuRates(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        rates = measure()
    with output_errors(f"{path} (in RECALKV_CACHE)"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(rates)))
    return rates


def measure() -> CpuRates:
    """Time a matrix product and a sum, the best of some repetitions each."""
    rows, depth, columns = PRODUCT
    a = torch.randn(rows, depth, dtype=torch.bfloat16)
    b = torch.randn(depth, columns, dtype=torch.bfloat16)
    data = torch.ones(ELEMENTS)
    return CpuRates(
        flop_per_s=2 * rows * depth * columns / _best(lambda: a @ b),
        bytes_per_s=data.nbytes / _best(data.sum),
    )


def _best(run: Callable[[], object]) -> float:
    return min(timeit.repeat(run, number=1, repeat=REPEATS))


def _machine() -> str:
    """What rates depend on, as a digest: models of processors go by few names in virtual machines,
    so that their instruction sets tell them apart."""
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line for line in names if line.startswith("model name")), "")
    parts = (name, torch.cpu.get_capabilities(), torch.get_num_threads(), torch.__version__)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
