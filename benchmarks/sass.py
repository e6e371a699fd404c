"""What the loop over tiles of a compiled Triton kernel consists of, read off its machine code."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache

import triton

#: An instruction's address and text, as cuobjdump prints them.
LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
BRANCH = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")


#: Matrix products of a warp, of a group of four, and of one thread for all.
WARP_PRODUCT = "HMMA.16816."
GROUP_PRODUCT = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\.")
THREAD_PRODUCT = "UTCHMMA"


@dataclass(frozen=True, slots=True)
class Loop:
    """The longest loop: what one round of it consists of.

    Args:
        instructions: all.
        spills: of them, those that reach for spills.
        warp_flop: of matrix products, those of four warps counted a quarter for each.
        thread_products: matrix products that one thread issues, whose sizes are not told.
    """

    instructions: int
    spills: int
    warp_flop: float = 0.0
    thread_products: int = 0


def longest_loop(sass: str) -> Loop:
    """Read disassembled code; a kernel without a loop has none of either."""
    code = [(int(address, 16), text) for address, text in LINE.findall(sass)]
    place = {address: i for i, (address, _) in enumerate(code)}
    longest: list[str] = []
    for i, (address, text) in enumerate(code):
        found = BRANCH.search(text)
        target = int(found[1], 16) if found else address
        if target < address and i - place[target] >= len(longest):
            longest = [each for _, each in code[place[target] : i + 1]]
    return Loop(
        len(longest),
        sum("LDL" in each or "STL" in each for each in longest),
        sum(map(_product_flop, longest)),
        sum(THREAD_PRODUCT in each for each in longest),
    )


def _product_flop(text: str) -> float:
    if WARP_PRODUCT in text:
        return 2.0 * 16 * 8 * 16
    found = GROUP_PRODUCT.search(text)
    return 2 * math.prod(map(int, found.groups())) / 4 if found else 0.0


@cache
def loop_of(cubin: bytes) -> Loop:
    """The same of a compiled kernel."""
    return longest_loop(cuobjdump(cubin, "-sass"))


@cache
def whole_of(cubin: bytes) -> Loop:
    """A whole compiled kernel, for one whose programs run through it once."""
    code = [text for _, text in LINE.findall(cuobjdump(cubin, "-sass"))]
    return Loop(len(code), sum("LDL" in each or "STL" in each for each in code))


def cuobjdump(cubin: bytes, option: str) -> str:
    """What Triton's cuobjdump prints about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        return subprocess.run(
            [tool, option, file.name], check=True, capture_output=True, text=True
        ).stdout
