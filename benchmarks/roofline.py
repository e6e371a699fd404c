"""What the machine can do, measured, and what one attention call asks of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .geometries import Geometry, Latent


@dataclass(frozen=True, slots=True)
class Roof:
    """Measured limits: bytes per second from memory, FLOP per second of a matrix product."""

    bytes_per_s: float
    flop_per_s: float

    def seconds(self, work: Work) -> float:
        """The least time that ``work`` can take."""
        return max(work.bytes / self.bytes_per_s, work.flop / self.flop_per_s)


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes of latents read once, and arithmetic as the op is written (keys rebuilt in full)."""

    bytes: int
    flop: int


def attention_work(
    geometry: Geometry, latent: Latent, context: int, batch: int, queries: int, token_bytes: int
) -> Work:
    """Work of one call: every query sees the context and its own tokens, ``token_bytes`` each."""
    tokens = context * batch
    dense_keys = geometry.num_kv_heads * geometry.head_dim
    rebuild = 2 * latent.k_width * dense_keys
    attend = 2 * queries * geometry.num_heads * (geometry.head_dim + latent.v_width)
    return Work(bytes=tokens * token_bytes, flop=tokens * (rebuild + attend))


def measure_roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """Read bandwidth of a sum, and torch's matrix product in ``dtype`` or float32, whichever is
    faster: CPUs without bf16 instructions compute in float32.

    512 MiB and 1024 x 1024 on a CPU, 4 GiB and 8192 x 8192 on a GPU.
    """
    gpu = device.type == "cuda"
    data = torch.ones(1 << (30 if gpu else 27), device=device)
    size = 8192 if gpu else 1024
    factors = [torch.randn(size, size, device=device).to(t) for t in {dtype, torch.float32}]
    product = min(_best(lambda a=a: a @ a, device) for a in factors)
    return Roof(
        bytes_per_s=data.numel() * 4 / _best(data.sum, device), flop_per_s=2 * size**3 / product
    )


def _best(run: Callable[[], object], device: torch.device) -> float:
    """The shortest time of a second's runs: a roof is what the machine can do, not what it does on
    average."""
    times: list[float] = []
    while sum(times) < 1:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


@dataclass(frozen=True, slots=True)
class Timing:
    """Median and quartiles of repeated runs, in seconds."""

    median: float
    low: float
    high: float


def alternate(
    runs: list[Callable[[], object]], seconds: float, calls: int, least: int = 7
) -> list[Timing]:
    """Time several functions in turn, so that what else the machine does hits all of them.

    Runs until ``seconds`` have passed and each ran ``least`` times, after one untimed round; times
    are per call, of which a function makes ``calls``.
    """
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    began = time.perf_counter()
    while len(times[0]) < least or time.perf_counter() - began < seconds:
        for run, spent in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            spent.append((time.perf_counter() - start) / calls)
    timings = []
    for spent in times:
        low, median, high = statistics.quantiles(spent, n=4)
        timings.append(Timing(median, low, high))
    return timings
