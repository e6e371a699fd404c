"""Instruction counts of the CUDA decode kernel for Hopper: nvcc, no GPU needed.

``python -m recalkv_vllm.benchmarks.hopper_report`` compiles instantiations for sm_90a and prints
registers, spills, and for layouts of Llama-3.1-8B the warp instructions of the main loop per tile
of 64 tokens and KV head, which a budget limits. It exits with 1 if a kernel spills or a layout
exceeds its budget; products that ptxas had to serialize are an error.

A tile takes one round of the loop of each of a warpgroup's four warps, or half a round where
latents are in bands, and one of both producers'.
Counted is the longest way through a round, rescaling of the running softmax included, with two
exceptions: a barrier that is waited for counts as one question, and copies are those of a tile that
is seen as a whole.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from recalkv_vllm.band_format import BLOCK_COLUMNS
from recalkv_vllm.cost import GPUS
from recalkv_vllm.cost.gpu import issue_seconds, memory_seconds
from recalkv_vllm.ops.cuda.hopper import HOPPER_COLUMN_TILES, HOPPER_V_TILES
from recalkv_vllm.ops.cuda.plan import HEAD_DIMS

from .cuda_compiler import compile_source
from .sass_paths import Code

ELEMENTS = ("BFloat16", "Float16")
ARCH = "sm_90a"
#: Of the model; scales of all its groups are copied, four times 16 bytes by each of eight lanes.
GROUPS = 8
#: Tiles that a warpgroup takes in a round where latents are in bands.
TURN = 2
#: Copies that a tile at an edge of what is seen takes: with a predicate, by which they are zeros,
#: and of scales one by one.
EDGE_COPY = re.compile(r"LDGSTS.*, !?P\d|STS\.U8")


@dataclass(frozen=True, slots=True)
class HopperInstantiation:
    """One compiled version; names as in ``csrc/cuda/hopper_shape.cuh``."""

    element: str
    head_dim: int
    column_tiles: int
    v_tiles: int
    lean: bool
    bands: bool

    def source(self) -> str:
        """An explicit instantiation, in C++."""
        sizes = f"{self.head_dim}, {self.column_tiles}, {self.v_tiles}"
        kinds = f"{str(self.lean).lower()}, {str(self.bands).lower()}"
        kernel = f"decode_attention_hopper<HopperShape<{self.element}, {sizes}, {kinds}>>"
        return f"template __global__ void {kernel}(const DecodeParams);\n"

    @classmethod
    def of_symbol(cls, symbol: str) -> HopperInstantiation:
        """Read a mangled name."""
        found = re.search(
            r"HopperShapeINS_\d+(\w+?)ELi(\d+)ELi(\d+)ELi(\d+)ELb([01])ELb([01])E", symbol
        )
        if found is None:
            raise ValueError(f"expected a kernel for Hopper, found {symbol}")
        element, *sizes, lean, bands = found.groups()
        return cls(element, *map(int, sizes), lean == "1", bands == "1")


@dataclass(frozen=True, slots=True)
class HopperRow:
    """What one instantiation compiled to; spills in bytes."""

    kernel: HopperInstantiation
    registers: int
    spills: int
    code: Code


@dataclass(frozen=True, slots=True)
class Layout:
    """What a tile of one KV head consists of, and its budget of warp instructions.

    Args:
        row_bytes: copied of a token.
        one_piece: whether its columns are.
        k_bits: of the K span's blocks of 32 columns, where latents are in bands.
        v_bits: of the V span's blocks that K does not read.
    """

    name: str
    kernel: HopperInstantiation
    k_width: int
    row_bytes: int
    one_piece: bool
    budget: int
    k_bits: tuple[int, ...] = ()
    v_bits: tuple[int, ...] = ()

    @property
    def own_columns(self) -> int:
        """Of the V span, those that K does not read."""
        if self.kernel.bands:
            return BLOCK_COLUMNS * len(self.v_bits)
        return self.row_bytes // 2 - self.k_width


PLAIN = HopperInstantiation("BFloat16", 128, 1, 8, True, False)
CODED = HopperInstantiation("BFloat16", 128, 1, 8, True, True)
WIDE = HopperInstantiation("BFloat16", 128, 1, 16, True, True)
#: Llama-3.1-8B, one head per group, one query.
LAYOUTS = (
    Layout("joint, 50 %, bf16", PLAIN, k_width=128, row_bytes=256, one_piece=True, budget=1225),
    Layout("split, 50 %, bf16", PLAIN, k_width=64, row_bytes=256, one_piece=False, budget=1175),
    Layout("joint, 87 %, bands", CODED, 128, 64, one_piece=True, budget=1775, k_bits=(6, 4, 4, 2)),
    Layout("joint, 76 %, bands", CODED, 128, 112, one_piece=True, budget=1900, k_bits=(8, 8, 6, 6)),
    Layout(
        "nested, 76 %, bands",
        WIDE,
        k_width=128,
        row_bytes=112,
        one_piece=True,
        budget=2550,
        k_bits=(6, 6, 4, 4),
        v_bits=(3, 3, 2),
    ),
)
#: What tells the code for a block's bits apart: a mask of its codes, or what they are centered by.
MARKS = {2: "0x180018,", 3: "0x300030,", 4: "0x3c003c0,", 6: "0xf000f0,", 8: "-2.25, -2.25"}


def predicted_time(layout: Layout, instructions: int) -> float:
    """Time of a tile relative to that of the dense cache, which memory limits.

    The larger one of the times that memory and issuing take; nothing of it was measured.
    """
    gpu, scales = GPUS["h100"], len(layout.k_bits) + len(layout.v_bits)
    memory = memory_seconds(64 * (layout.row_bytes + scales), gpu)
    dense = memory_seconds(64 * 2 * 2 * layout.kernel.head_dim, gpu)
    return max(memory, issue_seconds(instructions, gpu)) / dense


def instantiations() -> Iterator[HopperInstantiation]:
    """The whole table."""
    for sizes in itertools.product(
        ELEMENTS, HEAD_DIMS, HOPPER_COLUMN_TILES, HOPPER_V_TILES, (True, False), (True, False)
    ):
        yield HopperInstantiation(*sizes)


def compile_hopper(wanted: Sequence[HopperInstantiation]) -> list[HopperRow]:
    """Compile instantiations in one run of nvcc.

    Raises:
        RuntimeError: nvcc fails, or ptxas serializes products.
    """
    source = "".join(kernel.source() for kernel in wanted)
    compiled = compile_source("hopper_decode.cuh", source, ARCH)
    rows = []
    for part in compiled.messages.split("Compiling entry function")[1:]:
        symbol = part.split("'")[1]
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", part)]
        registers = re.search(r"Used (\d+) registers", part)
        if registers is None or len(spills) != 2:
            raise RuntimeError(f"ptxas: expected registers and spills, found {part!r}")
        kernel = HopperInstantiation.of_symbol(symbol)
        rows.append(HopperRow(kernel, int(registers[1]), sum(spills), Code(compiled.code[symbol])))
    return rows


def instructions_per_tile(code: Code, layout: Layout) -> tuple[float, int, int]:
    """Warp instructions of a tile: of a consumer warp, of the latents' producer, and of the
    queries'."""
    consumer = consumer_length(code, layout)
    chunks = layout.row_bytes // 16
    # Where columns are one piece, lanes copy two lines of 128 bytes at a time; a row of few bytes
    # has four lanes, not eight.
    lines = 2 if layout.one_piece and chunks % 16 == 0 else 1
    lanes = 4 if layout.k_bits and chunks <= 4 else 8

    def rounds(inner: range) -> int | None:
        text = code.text[inner.start : inner.stop]
        copies = sum("LDGSTS.E" in each for each in text)
        if copies == 4:
            return -(-len(layout.k_bits + layout.v_bits) * GROUPS // 32)
        if copies:
            return -(-chunks // (lanes * lines)) if copies == 2 * lanes * lines else None
        return 1

    def edge(text: str) -> bool:
        return EDGE_COPY.search(text) is not None

    latents = code.round_length(code.loop_with("LDGSTS.E", "ARRIVES"), rounds, edge)
    queries = code.round_length(code.loop_with("STS.64", "SYNCS"), rounds, edge)
    return consumer, latents, queries


def consumer_length(
    code: Code, layout: Layout, dequantize: bool = True, multiply: bool = True
) -> float:
    """Warp instructions of a consumer for a tile; without the loops that take codes to elements, or
    those of the keys' products, if so asked."""
    outer = code.loop_with("HGMMA", "MOVM")
    products = next(i for i in outer if "HGMMA" in code.text[i])

    def rounds(inner: range) -> int | None:
        text = code.text[inner.start : inner.stop]
        if any("HGMMA" in each for each in text):
            # Of elements, 64 columns a round, and the first round is in front of the loop. Of slots
            # four, and before these one at a time.
            blocks = len(layout.k_bits)
            few = sum("gdesc[UR" in each for each in text) < 8
            times = blocks % 4 if few else blocks // 4
            return (times if blocks else -(-layout.k_width // 64) - 1) * multiply
        found = [bits for bits, mark in MARKS.items() if any(mark in each for each in text)]
        if not found:
            return 1
        # Blocks of the K span come before its products. A loop over all bits has one round.
        wanted = layout.k_bits if inner.start < products else layout.v_bits
        times = wanted.count(found[0]) if len(found) == 1 else min(1, len(wanted))
        return times * dequantize if times else None

    length = code.round_length(outer, rounds, lambda text: False)
    return length / (TURN if layout.kernel.bands else 1)


def main() -> int:
    faults = 0
    for head_dim in HEAD_DIMS:
        wanted = [kernel for kernel in instantiations() if kernel.head_dim == head_dim]
        for row in compile_hopper(wanted):
            k = row.kernel
            faults += bool(row.spills)
            print(
                f"{ARCH} {k.element:8} d={k.head_dim:<3} rows={4 * k.column_tiles} "
                f"v_width<={16 * k.v_tiles:<3} {'lean' if k.lean else 'full'} "
                f"{'bands' if k.bands else 'plain'} reg {row.registers} "
                f"spills {row.spills}",
                flush=True,
            )
    for row in compile_hopper(sorted({layout.kernel for layout in LAYOUTS}, key=str)):
        for layout in LAYOUTS:
            if layout.kernel == row.kernel:
                consumer, *producers = instructions_per_tile(row.code, layout)
                total = round(4 * consumer + sum(producers))
                faults += total > layout.budget
                opening = consumer - consumer_length(row.code, layout, dequantize=False)
                products = consumer - consumer_length(row.code, layout, multiply=False)
                print(
                    f"{layout.name}: 4 x {consumer:g} + {producers[0]} + {producers[1]} = {total} "
                    f"warp instructions per tile, budget {layout.budget}; predicted time "
                    f"{predicted_time(layout, total):.2f} of the dense cache's; of a consumer's, "
                    f"{opening:g} dequantize and {products:g} are of loops over products"
                )
    print(f"{faults} faults", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
