"""What the loop over tiles of a compiled Triton kernel consists of, read off its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache

import triton

#: An instruction's address and text, as cuobjdump prints them.
LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
BRANCH = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")


@dataclass(frozen=True, slots=True)
class Loop:
    """The longest loop: instructions of one round, and those of them that reach for spills."""

    instructions: int
    spills: int


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
    return Loop(len(longest), sum("LDL" in each or "STL" in each for each in longest))


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
