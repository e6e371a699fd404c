"""A warp's registers, and the instructions between them (PTX ISA, "Integer Arithmetic" to "Data
Movement"). A register is an array of 32 lanes' bits, a predicate one of truth values."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from tests.ptx.memory import MachineError
from tests.ptx.program import Parts

LANES = np.arange(32)
EVERY_LANE = np.ones(32, bool)
#: What a register holds that nothing was written to: NaN, in 16 bits too.
POISON = 0x7FC07FC07FC07FC0
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES = {
    **{f"{kind}{8 * n}": bits for n, bits in BITS.items() for kind in "bu"},
    **{"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64},
    **{"f16": np.float16, "f32": np.float32},
}
WIDTHS = {"%rs": 2, "%rd": 8}


def bits_of(values: np.ndarray) -> np.ndarray:
    """The same as unsigned integers; predicates as they are."""
    values = np.ascontiguousarray(values)
    return values if values.dtype == bool else values.view(BITS[values.dtype.itemsize])


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def truncated(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Quotients of integers, as hardware rounds them; of zero, anything."""
    x, y = x.astype(np.int64), np.where(y == 0, 1, y).astype(np.int64)
    return np.abs(x) // np.abs(y) * np.sign(x) * np.sign(y)


def fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """``x y + z``, of floats rounded once."""
    return x.astype(np.float64 if x.dtype.kind == "f" else x.dtype) * y + z


def shifted(x: np.ndarray, by: np.ndarray, shift: Callable) -> np.ndarray:
    """By more than the width: zeros, or the sign."""
    most = 8 * x.dtype.itemsize - 1
    once = shift(x, np.minimum(by, most).astype(x.dtype))
    return np.where(by > most, shift(once, x.dtype.type(1)), once)


class Registers:
    """Registers by name, and what instructions make of them; ``lanes`` are those that execute."""

    COMPARE: ClassVar[dict[str, Callable]] = {
        name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
    }

    def __init__(self, special: dict[str, np.ndarray]):
        self.values = dict(special)

    def get(self, operand: str, type_name: str) -> np.ndarray:
        """An operand: a register, or a constant."""
        dtype = np.dtype(TYPES[type_name])
        if operand.startswith("0f"):
            return np.full(32, int(operand[2:], 16), np.uint32).view(dtype)
        if re.match(r"-?\d", operand):
            value = int(operand.rstrip("U"), 0) & (1 << 8 * dtype.itemsize) - 1
            return np.full(32, value, BITS[dtype.itemsize]).view(dtype)
        found = self.values.get(operand)
        if found is None:
            if not re.fullmatch(r"%[a-z]+\d+", operand):
                raise MachineError(f"{operand}: not known here")
            found = np.full(32, POISON, np.uint64).astype(BITS[dtype.itemsize])
        if found.dtype.itemsize > dtype.itemsize:  # the lower part, as stores and cvt take it
            found = found.astype(BITS[dtype.itemsize])
        if found.dtype.itemsize != dtype.itemsize or found.dtype == bool:
            raise MachineError(f"{operand}: {found.dtype} read as {type_name}")
        return found.view(dtype)

    def predicate(self, operand: str) -> np.ndarray:
        if re.match(r"-?\d", operand):
            return np.full(32, operand != "0")
        found = self.values[operand.lstrip("!")]
        return ~found if operand.startswith("!") else found

    def put(self, name: str, values: np.ndarray, lanes: np.ndarray) -> None:
        """Write the lanes of a register, which is as wide as its name says."""
        values = bits_of(values)
        if lanes is not EVERY_LANE:
            old = self.values.get(name)
            if old is None:
                old = np.full(32, POISON, np.uint64).astype(values.dtype)
            values = np.where(lanes, values, old)
        self.values[name] = values

    def put_extended(self, name: str, values: np.ndarray, lanes: np.ndarray) -> None:
        """The same of what may be narrower than the register, a load or ``cvt``: with its sign."""
        width = WIDTHS.get(name[:3], 4)
        if values.dtype.itemsize < width:
            kind = "s" if values.dtype.kind == "i" else "u"
            values = values.astype(TYPES[f"{kind}{8 * width}"])
        self.put(name, values, lanes)

    @staticmethod
    def names(operand: str) -> list[str]:
        """Registers of a vector, or the one."""
        return [name.strip() for name in operand.strip("{} ").split(",")]

    def elementwise(
        self, parts: Parts, operands: Parts, lanes: np.ndarray, function: Callable
    ) -> None:
        """A function of one, two or three operands of one type."""
        target, *sources = operands
        if parts[-1] == "pred":
            result = function(*map(self.predicate, sources))
        elif parts[-1] == "f16x2":
            pairs = [
                self.get(x, "b32").copy().view(np.float16).reshape(32, 2).astype(np.float64)
                for x in sources
            ]
            result = function(*pairs).astype(np.float16).view(np.uint32)[:, 0]
        else:
            values = [self.get(x, parts[-1]) for x in sources]
            result = np.asarray(function(*values)).astype(values[0].dtype)
        self.put(target, result, lanes)

    def widening(self, parts: Parts, operands: Parts, lanes: np.ndarray) -> None:
        """``mul`` and ``mad``, "wide" of the product in twice the width, or "hi" of its half."""
        width = int(parts[-1][1:])
        kind = f"{parts[-1][0]}{2 * width}"
        left, right = (self.get(x, parts[-1]).astype(TYPES[kind]) for x in operands[1:3])
        product = left * right
        if "hi" in parts:
            kind = parts[-1]
            product = (product >> width).astype(TYPES[kind])
        if len(operands) > 3:
            product = product + self.get(operands[3], kind)
        self.put(operands[0], product, lanes)

    def move(self, parts: Parts, operands: Parts, lanes: np.ndarray) -> None:
        """``mov``, also of a register from or to its parts."""
        to, source = map(self.names, operands)
        if parts[-1] == "pred":
            return self.put(to[0], self.predicate(source[0]), lanes)
        size = np.dtype(TYPES[parts[-1]]).itemsize
        narrow = BITS[size // max(len(to), len(source))]
        kind = f"b{8 * np.dtype(narrow).itemsize}"
        if len(to) > 1:
            split = self.get(source[0], f"b{8 * size}").copy().view(narrow).reshape(32, -1)
            for i, name in enumerate(to):
                self.put(name, split[:, i], lanes)
        elif len(source) > 1:
            joined = np.stack([self.get(name, kind) for name in source], 1)
            self.put(to[0], joined.view(BITS[size])[:, 0], lanes)
        else:
            self.put(to[0], self.get(source[0], parts[-1]), lanes)
        return None

    def convert(self, parts: Parts, operands: Parts, lanes: np.ndarray) -> None:
        """``cvt`` between the types that kernels use."""
        to, source = parts[-2:]
        if to in ("bf16x2", "f16x2"):
            halves = [self.get(x, "f32") for x in operands[:0:-1]]
            if "satfinite" in parts:
                halves = [np.clip(x, -65504, 65504) for x in halves]
            rounded = [
                to_bfloat16(x) if to == "bf16x2" else x.astype(np.float16).view(np.uint16)
                for x in halves
            ]
            result = np.stack(rounded, 1).view(np.uint32)[:, 0]
        elif source == "bf16":
            result = from_bfloat16(self.get(operands[1], "b16"))
        elif to == "bf16":
            result = to_bfloat16(self.get(operands[1], "f32"))
        elif to.startswith("f") or source[0] in "us":
            result = self.get(operands[1], source).astype(TYPES[to])
        else:
            raise MachineError("not known here")
        self.put_extended(operands[0], result, lanes)
