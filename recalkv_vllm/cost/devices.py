"""What devices can do, by their data sheets, and how much of it attention kernels get."""

from __future__ import annotations

from dataclasses import dataclass

#: Part of the peak rate of memory that a good attention kernel reaches; it divides out where both
#: caches are bound by memory. FlashAttention-3 is said to decode at about this part of an H100's.
MEMORY_EFFICIENCY = 0.87
#: Part of the peak matrix rate that products reach beside the work that feeds them; supposed.
TENSOR_EFFICIENCY = 2 / 3
#: Instructions that a scheduler issues per clock in kernels that wait for memory, tensor cores and
#: barriers with 8 to 16 warps per multiprocessor; supposed.
ISSUE_EFFICIENCY = 0.6
#: Of every multiprocessor since compute capability 7.0 (CUDA C++ Programming Guide).
SCHEDULERS = 4
SHARED_BYTES_PER_CLOCK = 128


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU by its data sheet.

    Args:
        arch: compute capability without the dot.
        multiprocessors: how many.
        clock: boost clock in Hz.
        tensor_flop_per_s: dense products in bfloat16.
        bytes_per_s: from memory.
    """

    arch: int
    multiprocessors: int
    clock: float
    tensor_flop_per_s: float
    bytes_per_s: float

    @property
    def clocks_per_s(self) -> float:
        """Of all multiprocessors together."""
        return self.multiprocessors * self.clock

    @property
    def wide_mma(self) -> bool:
        """Whether matrix operands are read from shared memory (``wgmma``, ``tcgen05``)."""
        return self.arch // 10 in (9, 10)


@dataclass(frozen=True, slots=True)
class Cpu:
    """A CPU by its measured rates.

    Args:
        flop_per_s: of bf16 matrix products.
        bytes_per_s: from memory.
        stock_flop_per_byte: FLOP that it could do while the stock kernel takes a byte of the dense
            cache.
    """

    flop_per_s: float
    bytes_per_s: float
    stock_flop_per_byte: float


Device = Gpu | Cpu

#: Data sheets of NVIDIA, without sparsity: H100 SXM and H200 SXM (990 TFLOP/s; 3.35 and 4.8 TB/s;
#: 132 multiprocessors; the clock is that of the H100 PCIe, which the SXM card exceeds), A100 80 GB
#: SXM (312 TFLOP/s, 2.04 TB/s, 108 at 1.41 GHz), L40S (362 TFLOP/s, 0.864 TB/s, 142 at 2.52 GHz),
#: B200 in a DGX B200 (2.25 PFLOP/s, 8 TB/s; 148 at the 1.85 GHz that this rate takes).
GPUS = {
    "h100": Gpu(90, 132, 1.755e9, 990e12, 3.35e12),
    "h200": Gpu(90, 132, 1.755e9, 990e12, 4.8e12),
    "a100": Gpu(80, 108, 1.41e9, 312e12, 2.04e12),
    "l40s": Gpu(89, 142, 2.52e9, 362e12, 0.864e12),
    "b200": Gpu(100, 148, 1.85e9, 2250e12, 8e12),
}

#: FLOP per byte of stock: from times against vLLM's kernel (docs/performance.md, Zen 4), which 32
#: gives within a tenth. With AMX four times the matrix rate beside the same memory; its kernel was
#: not timed.
STOCK_FLOP_PER_BYTE = {"cpu": 32.0, "cpu-amx": 128.0}
#: One core of a Zen 4 (docs/kernels/cpu_attention.md), and the same with AMX.
CPUS = {
    "cpu": Cpu(0.21e12, 24e9, STOCK_FLOP_PER_BYTE["cpu"]),
    "cpu-amx": Cpu(0.84e12, 24e9, STOCK_FLOP_PER_BYTE["cpu-amx"]),
}


def device_named(name: str) -> Device:
    """One of :data:`GPUS` and :data:`CPUS`. Raises :class:`KeyError` for any other name."""
    return GPUS[name] if name in GPUS else CPUS[name]
