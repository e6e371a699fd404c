"""Time of attention on a GPU: the slowest of four things that go on at once."""

from __future__ import annotations

from dataclasses import dataclass

from recalkv_vllm.cost.devices import (
    ISSUE_EFFICIENCY,
    MEMORY_EFFICIENCY,
    SCHEDULERS,
    SHARED_BYTES_PER_CLOCK,
    TENSOR_EFFICIENCY,
    Gpu,
)
from recalkv_vllm.cost.hopper import hopper_spends
from recalkv_vllm.cost.kernel import Spent
from recalkv_vllm.cost.layer import LayerCost
from recalkv_vllm.cost.triton import triton_spends


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds per cached token of a layer, if nothing else were to be waited for.

    Args:
        kernel: whose.
        memory: latents, read once.
        tensor: matrix products.
        shared: shared memory.
        issue: instructions.
    """

    kernel: str
    memory: float
    tensor: float
    shared: float
    issue: float

    @property
    def slowest(self) -> float:
        return max(self.memory, self.tensor, self.shared, self.issue)


def gpu_times(layer: LayerCost, gpu: Gpu) -> list[Times]:
    """Of every kernel that can decode the layer there."""
    spent = (hopper_spends(layer, gpu.arch), triton_spends(layer, gpu.arch))
    return [_times(each, layer.token_bytes, gpu) for each in spent if each is not None]


def gpu_token_seconds(layer: LayerCost, gpu: Gpu) -> float:
    """Of the fastest kernel; infinite if there is none."""
    return min((times.slowest for times in gpu_times(layer, gpu)), default=float("inf"))


def fastest_kernel(layer: LayerCost, gpu: Gpu) -> str | None:
    """Its name, of equally fast ones the CUDA C++ one's; None if there is none."""
    fastest = min(gpu_times(layer, gpu), key=lambda times: times.slowest, default=None)
    return None if fastest is None else fastest.kernel


def memory_seconds(nbytes: float, gpu: Gpu) -> float:
    """To read as much."""
    return nbytes / (gpu.bytes_per_s * MEMORY_EFFICIENCY)


def issue_seconds(instructions: float, gpu: Gpu) -> float:
    """To issue as many on all multiprocessors together."""
    return instructions / (gpu.clocks_per_s * SCHEDULERS * ISSUE_EFFICIENCY)


def _times(spent: Spent, token_bytes: int, gpu: Gpu) -> Times:
    return Times(
        spent.kernel,
        memory=memory_seconds(token_bytes, gpu),
        tensor=spent.tensor_flop / (gpu.tensor_flop_per_s * TENSOR_EFFICIENCY),
        shared=spent.shared_bytes / (gpu.clocks_per_s * SHARED_BYTES_PER_CLOCK),
        issue=issue_seconds(spent.instructions, gpu),
    )
