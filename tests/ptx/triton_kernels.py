"""This project's Triton launches, compiled for sm_90 and run on the machine.

``python -m tests.ptx.triton_kernels FORMAT`` is a child of ``test_triton.py``: a process in which
Triton compiles does not interpret.
"""

from __future__ import annotations

import struct
import sys

import torch
import triton

from recalkv_vllm.benchmarks import compile_report, smoke
from recalkv_vllm.benchmarks.geometries import Geometry
from recalkv_vllm.kernels import heuristics
from recalkv_vllm.ops import triton as triton_ops
from recalkv_vllm.ops.triton.launch import Launch
from tests.ptx.block import Grid, Order, run_grid
from tests.ptx.memory import Global
from tests.ptx.program import entries, parse

TARGET = heuristics.Target(90, 4)
#: Head size, query heads per KV head and dtype are Llama 3's; the rest is small.
GEOMETRY = Geometry("small-llama", 8, 2, 128, 1, 5e5)
#: Decode and verification, a prompt, a prompt after a cached prefix; :data:`smoke.BATCH`.
BATCH = ((1, 200), (4, 61), (20, 20), (9, 70))
PACKED = {"fp32": "f", "i32": "i", "i64": "q", "u64": "Q"}


def run_launch(launch: Launch, order: Order) -> None:
    """Compile a launch and run it on its own tensors."""
    compiled = launch.compile()
    ((_, entry),) = entries(compiled.asm["ptx"]).items()
    program = parse(entry)
    given = [
        (kind, launch.arguments[name])
        for name, kind in compiled.src.signature.items()
        if isinstance(kind, str) and kind != "constexpr"
    ]
    parameters = [
        struct.pack("<Q", value.data_ptr())
        if isinstance(value, torch.Tensor)
        else struct.pack(f"<{PACKED[kind]}", value)
        for kind, value in given
    ]
    # Triton's own scratch memory comes last, and is not used.
    parameters += [bytes(8)] * (len(program.parameters) - len(parameters))
    blocks = (*launch.grid, 1, 1)[:3]
    grid = Grid(blocks, 32 * launch.warps, compiled.metadata.shared, tuple(parameters))
    tensors = [value for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
    run_grid(program, grid, Global.of(tensors), order)


def main() -> int:
    triton.runtime.driver.set_active(compile_report.CompileOnlyDriver(TARGET.arch))
    heuristics.target_of = lambda device: TARGET
    triton_ops.unsupported_reason = lambda *_: None
    smoke.KERNELS, smoke.BATCH = ("triton",), BATCH
    torch.use_deterministic_algorithms(True)  # new tensors start as NaN
    faults = 0
    for order in (Order(0, early=False), Order(1, early=True)):
        Launch.run = lambda launch, order=order: run_launch(launch, order)
        for what, fault in smoke.smoke("cpu", torch.bfloat16, GEOMETRY, tuple(sys.argv[1:])):
            print(f"{what}, {order}: {fault or 'agrees'}", flush=True)
            faults += fault is not None
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
