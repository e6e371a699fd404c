"""Instructions between registers, by the first part of their name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.memory import MachineError
from tests.ptx.program import Parts
from tests.ptx.registers import LANES, Registers, fused, shifted, truncated

ELEMENTWISE: dict[str, Callable] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": lambda x, y: (np.fmin if x.dtype.kind == "f" else np.minimum)(x, y),
    "max": lambda x, y: (np.fmax if x.dtype.kind == "f" else np.maximum)(x, y),
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "div": lambda x, y: x / y if x.dtype.kind == "f" else truncated(x, y),
    "rem": lambda x, y: x - truncated(x, y) * y,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
}


def compare(self: Registers, parts: Parts, operands: Parts, lanes: np.ndarray) -> None:
    """``setp``; a name that ends in u holds for NaN too."""
    if len(operands) != 3:
        raise MachineError("not known here")
    name, x, y = parts[1], self.get(operands[1], parts[-1]), self.get(operands[2], parts[-1])
    result = self.COMPARE[name.removesuffix("u")](x, y)
    if parts[-1].startswith("f"):
        numbers = ~(np.isnan(x) | np.isnan(y))
        result = result & numbers if name in self.COMPARE else result | ~numbers
    self.put(operands[0], result, lanes)


def select(self: Registers, parts: Parts, operands: Parts, lanes: np.ndarray) -> None:
    x, y = (self.get(operand, parts[-1]) for operand in operands[1:3])
    self.put(operands[0], np.where(self.predicate(operands[3]), x, y), lanes)


def shift(self: Registers, parts: Parts, operands: Parts, lanes: np.ndarray) -> None:
    x, by = self.get(operands[1], parts[-1]), self.get(operands[2], "u32")
    way = np.left_shift if parts[0] == "shl" else np.right_shift
    self.put(operands[0], shifted(x, by, way), lanes)


def extract_bits(self: Registers, parts: Parts, operands: Parts, lanes: np.ndarray) -> None:
    x, start, count = (self.get(operand, "u32").astype(np.uint64) for operand in operands[1:])
    one = np.uint64(1)
    found = x >> start & (one << count) - one
    if parts[-1] == "s32":
        negative = found >> (count - one) & one == one
        found = np.where(negative, found | np.uint64(0xFFFFFFFF) << count, found)
    self.put(operands[0], found.astype(np.uint32), lanes)


def permute_bytes(self: Registers, parts: Parts, operands: Parts, lanes: np.ndarray) -> None:
    both = np.stack([self.get(operand, "b32") for operand in operands[1:3]], 1)
    both = both.view(np.uint8).reshape(32, 8)
    choice = self.get(operands[3], "u32")
    found = np.zeros((32, 4), np.uint8)
    for i in range(4):
        picked = choice >> np.uint32(4 * i) & np.uint32(15)
        byte = both[LANES, picked & 7]
        found[:, i] = np.where(picked & 8, np.where(byte & 128, 255, 0), byte)
    self.put(operands[0], found.view(np.uint32)[:, 0], lanes)


def look_up(self: Registers, parts: Parts, operands: Parts, lanes: np.ndarray) -> None:
    """``lop3``: any function of three bits."""
    x, y, z = (self.get(operand, "b32") for operand in operands[1:4])
    table, found = int(operands[4], 0), np.zeros(32, np.uint32)
    for i in range(8):
        if table >> i & 1:
            found |= (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
    self.put(operands[0], found, lanes)


def shuffle(self: Registers, parts: Parts, operands: Parts, lanes: np.ndarray) -> None:
    by, clamp = (self.get(operand, "u32").astype(np.int64) for operand in operands[2:4])
    segment = clamp >> 8 & 31
    last, first = LANES & segment | clamp & 31 & ~segment, LANES & segment
    source, there = {
        "bfly": (LANES ^ by, (LANES ^ by) <= last),
        "idx": (first | by & ~segment, (first | by & ~segment) <= last),
        "up": (LANES - by, LANES - by >= last),
    }[parts[2]]
    values = self.get(operands[1], "b32")
    self.put(operands[0].split("|")[0], values[np.where(there, source, LANES)], lanes)


def reduce_warp(self: Registers, parts: Parts, operands: Parts, lanes: np.ndarray) -> None:
    values = self.get(operands[1], parts[-1])
    total = {"add": values.sum(dtype=values.dtype), "max": values.max()}[parts[2]]
    self.put(operands[0], np.full(32, total), lanes)


def vote(self: Registers, parts: Parts, operands: Parts, lanes: np.ndarray) -> None:
    agreed = {"any": np.any}[parts[2]](self.predicate(operands[1]))
    self.put(operands[0], np.full(32, agreed), lanes)


SPECIAL: dict[str, Callable] = {
    "setp": compare,
    "selp": select,
    "shl": shift,
    "shr": shift,
    "bfe": extract_bits,
    "prmt": permute_bytes,
    "lop3": look_up,
    "shfl": shuffle,
    "redux": reduce_warp,
    "vote": vote,
    "mov": Registers.move,
    "cvt": Registers.convert,
    # Addresses of one space are those of all: shared memory's are below 2^32.
    "cvta": lambda self, parts, *rest: Registers.move(self, ("mov", "u64"), *rest),
    "fma": lambda self, *rest: self.elementwise(*rest, fused),
}


def execute(registers: Registers, parts: Parts, operands: Parts, lanes: np.ndarray) -> None:
    """One instruction.

    Raises:
        MachineError: it is not known here.
    """
    name = parts[0]
    if name in ("mul", "mad") and {"wide", "hi"} & set(parts):
        registers.widening(parts, operands, lanes)
    elif name == "mad":
        registers.elementwise(parts, operands, lanes, fused)
    elif name in SPECIAL:
        SPECIAL[name](registers, parts, operands, lanes)
    elif name in ELEMENTWISE:
        registers.elementwise(parts, operands, lanes, ELEMENTWISE[name])
    else:
        raise MachineError("not known here")
