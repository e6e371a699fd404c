"""Ahead-of-time compile report of the Triton kernels: no GPU needed.

``python -m recalkv_vllm.benchmarks.compile_report`` compiles every kernel, as serving would launch
it, for sm_80, sm_90 and sm_100 at the geometries of common models, and reads registers, spills,
shared memory and tensor-core instructions off the result. It prints a table (or ``--json``) and
exits with 1 if a kernel spills, does not fit, or lacks tensor-core instructions. Each of the
different attention kernels, several thousand, takes two to five seconds of one core; Triton's
cache keeps them.

The compiler is the one of the Triton that is imported, which releases of torch differ in; another
is tried with ``pip install --no-deps --target DIR triton==VERSION`` and ``PYTHONPATH=DIR``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from recalkv_vllm.band_format import (
    BLOCK_COLUMNS,
    PLANES,
    Band,
    BandFormat,
    CacheFormat,
    bands_of,
)
from recalkv_vllm.kernels import heuristics
from recalkv_vllm.kernels.key_scales import write_key_scales
from recalkv_vllm.kernels.reconstruction import reconstruct_tokens
from recalkv_vllm.key_scales import split_pages
from recalkv_vllm.latent_format import BITS, LatentFormat
from recalkv_vllm.ops import Batch, Pieces
from recalkv_vllm.ops.triton.attention import TritonAttention
from recalkv_vllm.ops.triton.cache_update import cache_update_launch
from recalkv_vllm.ops.triton.key_scales import KeyScales
from recalkv_vllm.ops.triton.launch import Launch
from recalkv_vllm.ops.triton.plan import Part
from recalkv_vllm.ops.triton.reconstruction import Reconstruction
from recalkv_vllm.ops.triton.value_up import Values

from .geometries import GEOMETRIES, SPANS, Latent, group_sizes, latent_of
from .inputs import empty_cache, latent_layer
from .sass import Loop, cuobjdump, loop_of, whole_of

COMPRESSIONS = (0.5, 0.6, 0.7, 0.8)
LATENT_DTYPES = ("bf16", *BITS, "bands")
#: Of the bands of a region: both kinds with two planes, and many chunks.
BAND_BITS = (6, 4, 3, 2)
#: Of ranks, beside which quantized latents have fewer bits.
QUANTIZED_COMPRESSIONS = (0.25, 0.5)
#: Multiprocessors only decide pieces, which do not change the code.
TARGETS = {80: heuristics.Target(80, 108), 90: heuristics.Target(90, 132),
           100: heuristics.Target(100, 148)}  # fmt: skip
#: Enough for the rotation of a tile to be found in the table.
POSITIONS = 1024
#: Threads of a program.
MOST_THREADS = 1024
#: Tokens of a sequence that is cut into pieces.
LONG = 32768
MODES = {"decode": 1, "verify": 4, "prefill": 64}
TENSOR_CORE = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
USES_TENSOR_CORES = ("latent_attention", "project_values", "reconstruct_tokens")


@dataclass(frozen=True, slots=True)
class Case:
    """One layer's layout, as :func:`.geometries.latent_of` makes it; in ``bands`` or not.

    Args:
        band_bits: of the bands of every region, which are equally wide as far as blocks allow.
    """

    geometry: str
    compression: float
    group_size: int
    spans: str
    latent_dtype: str = "bf16"
    band_bits: tuple[int, ...] = BAND_BITS

    @property
    def latent(self) -> Latent:
        geometry = GEOMETRIES[self.geometry]
        return latent_of(geometry, self.compression, self.group_size, self.spans)

    @property
    def exists(self) -> bool:
        """Whether its spans can be stored so: bands are whole blocks of columns."""
        widths = [region.width for region in self.latent.regions]
        return self.latent_dtype != "bands" or all(n % BLOCK_COLUMNS == 0 for n in widths)

    @property
    def latent_format(self) -> CacheFormat | None:
        if self.latent_dtype == "bands":
            return equal_bands(self.latent, self.band_bits)
        return None if self.latent_dtype == "bf16" else LatentFormat(self.latent_dtype)


def equal_bands(latent: Latent, bits: tuple[int, ...]) -> BandFormat:
    """A band of each of ``bits`` in every region; some are left out if it has too few blocks."""
    bands: list[Band] = []
    for region in latent.regions:
        blocks = region.width // BLOCK_COLUMNS
        bands += bands_of([bits[len(bits) * i // blocks] for i in range(blocks)])
    return BandFormat(tuple(bands))


@dataclass(frozen=True, slots=True)
class Row:
    """What one kernel compiled to; memory in bytes.

    Args:
        slots: instructions that attention or reconstruction issues per cached token, all warps of a
            program together.
        loop_spills: instructions among those of a tile that load or store what was spilled.
    """

    case: Case
    mode: str
    arch: int
    kernel: str
    config: str
    registers: int
    spills: int
    shared: int
    tensor_core: str
    slots: float = 0.0
    loop_spills: int = 0

    def faults(self) -> list[str]:
        limit = TARGETS[self.arch].shared_bytes
        found = []
        if self.spills:
            found.append(f"{self.spills} bytes spilled, {self.loop_spills} accesses per tile")
        if self.shared > limit:
            found.append(f"{self.shared} of {limit} bytes of shared memory")
        if self.kernel in USES_TENSOR_CORES and not self.tensor_core:
            found.append("no tensor-core instruction")
        return found


class CompileOnlyUtils:
    """Of the driver below: reads off a compiled kernel what it would tell of a loaded one."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        # What does not fit is for the report to say.
        return {"max_shared_mem": 1 << 30}

    def load_binary(
        self, name: str, cubin: bytes, shared: int, device: int
    ) -> tuple[str, str, int, int, int]:
        registers, spilled = resources(cubin)
        return name, name, registers, spilled // 4, MOST_THREADS

    def unload_module(self, module: str) -> None:
        pass


class CompileOnlyDriver:
    """Stands in for Triton's GPU driver: names a target, launches nothing."""

    def __init__(self, arch: int):
        self.arch = arch
        self.utils = CompileOnlyUtils()

    def launcher_cls(self, *_: object) -> None:
        return None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps its compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


def cases(geometries: list[str]) -> Iterator[Case]:
    """Every layout that is looked at."""
    kinds = ((COMPRESSIONS, LATENT_DTYPES[:1]), (QUANTIZED_COMPRESSIONS, LATENT_DTYPES[1:]))
    for (compressions, dtypes), name in itertools.product(kinds, geometries):
        groups = group_sizes(GEOMETRIES[name])
        for layout in itertools.product(compressions, groups, SPANS, dtypes):
            case = Case(name, *layout)
            if case.exists:
                yield case


def launches(case: Case, target: heuristics.Target, mode: str) -> Iterator[Launch]:
    """Every launch of one layer, attention first."""
    geometry = GEOMETRIES[case.geometry]
    heads, head_dim = geometry.num_heads, geometry.head_dim
    latent, latent_format = case.latent, case.latent_format
    queries, dtype = MODES[mode], torch.bfloat16
    layer = latent_layer(geometry, latent, POSITIONS, dtype, latent_format=latent_format)
    attention = TritonAttention(layer, target)
    z, cache = torch.zeros(2, latent.rank, dtype=dtype), empty_cache(2, 16, latent.rank, layer)
    q = torch.zeros(queries, heads, head_dim, dtype=dtype)
    o_lat = torch.zeros(queries, heads, latent.v_width)
    lse = torch.zeros(queries, heads)
    index = torch.zeros(16, dtype=torch.int32)
    part = Part(0, 1, range(queries), queries, bounded=mode != "prefill")
    batch = Batch(index[None], index[:1], index[:2], max_seq_len=32)
    values, heads = Values(layer.v_up, None), torch.zeros_like(q)
    yield from attention.head_launches(part, q, cache, batch, values, heads)
    if mode == "prefill":
        return
    cut = replace(batch, max_seq_len=LONG)
    yield from attention.head_launches(part, q, cache, cut, values, heads)
    *_, merge = attention.launches(part, q, cache, cut, o_lat, lse)
    yield merge
    slots, (latents, _) = torch.zeros(1, dtype=torch.int64), split_pages(cache, layer.key_scales)
    yield cache_update_launch(z[:1], latents, slots, latent_format)
    if layer.key_scales:
        yield KeyScales(layer, attention.constants, target).launch(cache, slots)
    if mode == "decode":  # as good a place as any, for it knows no queries
        dense = layer.v_up.new_empty(16, geometry.num_kv_heads, head_dim)
        pieces = Pieces(index[None], index[:1], index[:2], 16)
        yield Reconstruction(layer, attention.constants, target).launch(cache, pieces, dense, dense)


@cache
def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack (Triton's kernels have no stack but for spills)."""
    usage = cuobjdump(cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected registers and stack, found {usage!r}")
    return int(found[1]), int(found[2])


def tiles_per_round(loop: Loop, arguments: dict[str, Any]) -> int:
    """How many tiles a round of the loop does: compilers for ``tcgen05`` do two at times, which
    its products tell."""
    heads, dim, v_block = (arguments[name] for name in ("HEADS", "DIM", "V_BLOCK"))
    depth = arguments["STREAM"] or arguments["K_WIDTH"]
    keys_and_scores = heads * (depth + dim) // 16
    values = arguments["TILE"] // 16 * -(-v_block // 128)
    return max(1, round(loop.thread_products / (keys_and_scores + values)))


def compile_row(case: Case, mode: str, arch: int, launch: Launch) -> Row:
    compiled = launch.compile()
    cubin = compiled.asm["cubin"]
    registers, spills = resources(cubin)
    tile = launch.arguments.get("TILE")
    loop, tiles = Loop(0, 0), 1
    if launch.kernel in (reconstruct_tokens, write_key_scales):  # loops are over a tile's columns
        loop = whole_of(cubin)
    elif tile:
        loop = loop_of(cubin)
        tiles = tiles_per_round(loop, launch.arguments)
    ptx = compiled.asm["ptx"]
    keys = ("HEADS", "V_BLOCK", "ROWS", "TILE", "LOCAL_ROPE", "STREAM", "LATE_VALUES", "COLUMNS",
            "DEPTH")  # fmt: skip
    config = {k.lower(): int(v) for k, v in launch.arguments.items() if k in keys}
    config |= {"warps": launch.warps, "stages": launch.stages}
    return Row(
        case,
        mode,
        arch,
        launch.kernel.__name__,
        " ".join(f"{k}={v}" for k, v in config.items()),
        registers,
        spills,
        compiled.metadata.shared,
        ", ".join(name for name in TENSOR_CORE if name in ptx),
        loop.instructions * launch.warps / (tile * tiles) if tile else 0.0,
        loop.spills,
    )


def report(wanted: list[Case], arches: list[int], modes: list[str]) -> Iterator[Row]:
    """Compile everything; a kernel that several cases share is compiled once."""
    for arch in arches:
        triton.runtime.driver.set_active(CompileOnlyDriver(arch))
        for case, mode in itertools.product(wanted, modes):
            for launch in launches(case, TARGETS[arch], mode):
                yield compile_row(case, mode, arch, launch)


def summary(rows: list[Row], arch: int) -> str:
    """One line on an architecture: how many launches, and which of them spill how much."""
    launched = [row for row in rows if row.arch == arch]
    spilling = [row for row in launched if row.spills]
    worst = max((row.spills for row in spilling), default=0)
    return (
        f"Triton {triton.__version__} sm_{arch}: {len(launched)} launches, "
        f"{sum(bool(row.faults()) for row in launched)} with faults, {len(spilling)} spill up to "
        f"{worst} bytes, {sum(row.loop_spills > 0 for row in spilling)} of them within the loop"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--geometry", nargs="*", type=str.lower, choices=GEOMETRIES, default=list(GEOMETRIES)
    )
    parser.add_argument("--arch", nargs="*", type=int, choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--mode", nargs="*", choices=MODES, default=list(MODES))
    parser.add_argument("--compression", nargs="*", type=float, default=(0.25, *COMPRESSIONS))
    parser.add_argument("--group-size", nargs="*", type=int, default=(1, 2, 3, 4))
    parser.add_argument("--spans", nargs="*", choices=SPANS, default=SPANS)
    parser.add_argument("--latent-dtype", nargs="*", choices=LATENT_DTYPES, default=LATENT_DTYPES)
    parser.add_argument(
        "--band-bits", nargs="+", type=int, choices=PLANES, default=BAND_BITS, metavar="BITS",
        help="of the bands of every region (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(arguments)
    wanted = [
        replace(case, band_bits=tuple(options.band_bits))
        for case in cases(options.geometry)
        if case.compression in options.compression
        and case.group_size in options.group_size
        and case.spans in options.spans
        and case.latent_dtype in options.latent_dtype
    ]
    rows = []
    faulty = 0
    for row in report(wanted, options.arch, options.mode):
        rows.append(row)
        case = row.case
        faults = row.faults()
        faulty += bool(faults)
        line = (
            f"sm_{row.arch:<3} {case.geometry:12} {case.compression} s={case.group_size} "
            f"{case.spans:8} {case.latent_dtype} {row.mode:7} {row.kernel:16} "
            f"reg {row.registers:3} smem {row.shared:6} {row.tensor_core:15} "
            f"{row.slots:5.1f} slots/token {row.config} "
            f"{'; '.join(faults)}"
        )
        print(line, file=sys.stderr if options.json else sys.stdout, flush=True)
    if options.json:
        described = [asdict(row) | {"faults": row.faults()} for row in rows]
        json.dump({"triton": triton.__version__, "rows": described}, sys.stdout)
    for arch in options.arch:
        print(summary(rows, arch), file=sys.stderr)
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
