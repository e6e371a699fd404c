"""Compile report of the CUDA C++ kernels: nvcc, no GPU and no CUDA build of torch needed.

``python -m recalkv_vllm.benchmarks.cuda_compile_report`` compiles every instantiation of the decode
kernel for sm_80 and sm_90a and reads registers, spills and instructions off the result, then plans
the layers of common models against the shared memory of A100 and H100. It prints tables (or
``--json``) and exits with 1 if a kernel spills or lacks tensor-core or asynchronous-copy
instructions, or if a layer has no plan.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from recalkv_vllm.ops.cuda import plan as cuda_plan
from recalkv_vllm.ops.cuda.shapes import LayerShape, Limits, Plan

from .cuda_compiler import compile_source
from .geometries import GEOMETRIES, SPANS, group_sizes, latent_of
from .inputs import latent_layer

#: What ``cuda_build.py`` has nvcc build where no GPU is to be seen.
ARCHES = ("sm_80", "sm_90a")
ELEMENTS = ("BFloat16", "Float16")
#: Shared memory of one block and of a multiprocessor, and multiprocessors.
LIMITS = {
    "A100": Limits(108, 163 << 10, 164 << 10),
    "H100": Limits(132, 227 << 10, 228 << 10),
}
COMPRESSIONS = (0.5, 0.6, 0.7, 0.8)
#: What a kernel must contain: matrix products, asynchronous copies, matrix loads.
INSTRUCTIONS = ("HMMA", "LDGSTS", "LDSM")


@dataclass(frozen=True, slots=True)
class Instantiation:
    """One compiled version of the decode kernel; names as in ``csrc/cuda/shape.cuh``."""

    element: str
    head_dim: int
    column_tiles: int
    v_tiles: int
    resident: bool

    def source(self) -> str:
        """An explicit instantiation, in C++."""
        shape = f"Shape<{self.element}, {self.head_dim}, {self.column_tiles}, {self.v_tiles}>"
        kernel = f"decode_attention<{shape}, {str(self.resident).lower()}>"
        return f"template __global__ void {kernel}(const DecodeParams);\n"

    @classmethod
    def of_symbol(cls, symbol: str) -> Instantiation | None:
        """Read a mangled name; None if it is another kernel's."""
        found = re.search(r"ShapeINS_\d+(\w+?)ELi(\d+)ELi(\d+)ELi(\d+)EEELb([01])E", symbol)
        if found is None:
            return None
        element, *sizes, resident = found.groups()
        return cls(element, *map(int, sizes), resident == "1")


@dataclass(frozen=True, slots=True)
class Row:
    """What one instantiation compiled to; spills in bytes, instructions counted in the code."""

    kernel: Instantiation
    arch: str
    registers: int
    spills: int
    instructions: dict[str, int]

    def faults(self) -> list[str]:
        found = [f"no {name}" for name, count in self.instructions.items() if count == 0]
        return [f"{self.spills} bytes spilled", *found] if self.spills else found


@dataclass(frozen=True, slots=True)
class PlanRow:
    """How one layer is cut up on one device."""

    device: str
    geometry: str
    compression: float
    group_size: int
    spans: str
    plan: Plan | None
    capacity: int  # pieces of a batch at most; 0 if it is not cut


def instantiations() -> list[Instantiation]:
    """The whole table."""
    kinds = [(c, v, True) for c, tiles in cuda_plan.INSTANTIATIONS.items() for v in tiles]
    kinds.append((*cuda_plan.STREAMING, False))
    return [
        Instantiation(element, head_dim, *kind)
        for element, head_dim, kind in itertools.product(ELEMENTS, cuda_plan.HEAD_DIMS, kinds)
    ]


def compile_kernels(wanted: Sequence[Instantiation], arch: str) -> list[Row]:
    """Compile instantiations in one run of nvcc.

    Raises:
        RuntimeError: nvcc fails; with its output.
    """
    compiled = compile_source("decode.cuh", "".join(kernel.source() for kernel in wanted), arch)
    code = {Instantiation.of_symbol(name): text for name, text in compiled.code.items()}
    rows = []
    for part in compiled.messages.split("Compiling entry function")[1:]:
        kernel = Instantiation.of_symbol(part.split("'")[1])
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", part)]
        registers = re.search(r"Used (\d+) registers", part)
        if kernel not in wanted or registers is None or len(spills) != 2:
            raise RuntimeError(f"ptxas: expected registers and spills, found {part!r}")
        counts = {name: len(re.findall(rf"\b{name}\b", code[kernel])) for name in INSTRUCTIONS}
        rows.append(Row(kernel, arch, int(registers[1]), sum(spills), counts))
    if {row.kernel for row in rows} != set(wanted):
        raise RuntimeError(f"nvcc: expected {len(wanted)} kernels, found {len(rows)}")
    return rows


def plan_rows(context: int = 32768, batch: int = 8) -> Iterator[PlanRow]:
    """Plans for decode of ``batch`` sequences of ``context`` tokens."""
    for geometry, compression, spans in itertools.product(GEOMETRIES.values(), COMPRESSIONS, SPANS):
        for size in group_sizes(geometry):
            latent = latent_of(geometry, compression, size, spans)
            sizes = LayerShape.of(latent_layer(geometry, latent, 1, torch.bfloat16))
            for device, limits in LIMITS.items():
                plan = cuda_plan.plan(sizes, limits, 1)
                capacity = 0
                if plan is not None:
                    per_kv = geometry.num_heads // geometry.num_kv_heads
                    blocks = cuda_plan.row_blocks(plan, batch, batch, per_kv)
                    bounds = cuda_plan.batch_bounds(plan, limits, blocks, context)
                    capacity = 0 if bounds is None else bounds.capacity
                yield PlanRow(device, geometry.name, compression, size, spans, plan, capacity)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="*", choices=ARCHES, default=list(ARCHES))
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(arguments)
    out = sys.stderr if options.json else sys.stdout
    rows, plans, faulty = [], list(plan_rows()), 0
    for arch, head_dim in itertools.product(options.arch, cuda_plan.HEAD_DIMS):
        wanted = [kernel for kernel in instantiations() if kernel.head_dim == head_dim]
        for row in compile_kernels(wanted, arch):
            rows.append(row)
            faulty += bool(row.faults())
            kernel = row.kernel
            counts = " ".join(f"{name} {count:4}" for name, count in row.instructions.items())
            factor = "shared" if kernel.resident else "L2"
            line = (
                f"{arch:6} {kernel.element:8} d={kernel.head_dim:<3} rows={8 * kernel.column_tiles}"
                f" v_width<={16 * kernel.v_tiles:<3} factor in {factor:6} reg {row.registers:3} "
                f"spills {row.spills} {counts} {'; '.join(row.faults())}"
            )
            print(line, file=out, flush=True)
    for planned in plans:
        layout = (
            f"{planned.device} {planned.geometry:12} {planned.compression} "
            f"s={planned.group_size} {planned.spans:8}"
        )
        p = planned.plan
        if p is None:
            faulty += 1
            print(f"{layout} no plan fits", file=out)
            continue
        print(
            f"{layout} heads {p.heads} teams {p.teams} stages {p.stages} tile {p.tokens} x "
            f"{p.tile_width:4} v_width<={16 * p.v_tiles:<3} "
            f"factor in {'shared' if p.resident else 'L2':6} shared {p.shared_bytes:6} "
            f"blocks/SM {p.blocks_per_multiprocessor} pieces {planned.capacity}",
            file=out,
        )
    if options.json:
        kernels = [asdict(row) | {"faults": row.faults()} for row in rows]
        json.dump({"rows": kernels, "plans": [asdict(row) for row in plans]}, sys.stdout)
    print(f"{len(rows)} kernels, {len(plans)} plans, {faulty} with faults", file=sys.stderr)
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
