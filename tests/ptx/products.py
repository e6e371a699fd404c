"""Matrix instructions of a warp (PTX ISA, "Warp Level" and "Asynchronous Warpgroup Level Matrix
Instructions"): fragments, operands in shared memory, and products that end when waited for."""

from __future__ import annotations

import re

import numpy as np

from tests.ptx.groups import Groups
from tests.ptx.memory import MachineError, Shared
from tests.ptx.program import Parts
from tests.ptx.registers import EVERY_LANE, LANES, Registers, from_bfloat16
from tests.ptx.transfers import Transfers

ROWS, PAIRS = LANES // 4, 2 * (LANES % 4)


def numbers(bits: np.ndarray, parts: Parts) -> np.ndarray:
    """Elements of 16 bits as float32."""
    bits = np.ascontiguousarray(bits)
    return from_bfloat16(bits) if "bf16" in parts else bits.view(np.float16).astype(np.float32)


def left_fragment(registers: list[np.ndarray]) -> np.ndarray:
    """``[16, 16]`` elements of a left-hand operand in four registers."""
    found = np.zeros((16, 16), np.uint16)
    for i, register in enumerate(registers):
        rows, columns = ROWS + 8 * (i % 2), PAIRS + 8 * (i // 2)
        found[rows, columns], found[rows, columns + 1] = register & 0xFFFF, register >> 16
    return found


def sum_place(i: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of a lane's register ``i`` of a sum."""
    return ROWS + 8 * (i // 2 % 2), 8 * (i // 4) + PAIRS + i % 2


def shared_operand(shared: Shared, descriptor: int, count: int, by_rows: bool) -> np.ndarray:
    """``[count, 16]`` elements that a descriptor of ``wgmma`` names.

    Args:
        by_rows: the 16 elements of a row lie together, else those of a column ("transposed").
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise MachineError("a descriptor with a base offset")
    width = {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62]
    row, column = np.arange(count)[:, None], np.arange(16)[None, :]
    if by_rows and width > 16:
        address = start + row // 8 * stride + row % 8 * width + column * 2
    elif by_rows:
        address = start + row // 8 * stride + column // 8 * leading + row % 8 * 16 + column % 8 * 2
    else:
        block = width // 2
        rows, columns = (leading, stride) if width > 16 else (stride, leading)
        address = start + row // block * rows + row % block * 2
        address = address + column % 8 * width + column // 8 * columns
    address = address ^ (address >> 7 & (width // 16 - 1)) << 4
    places = shared.places(address.reshape(-1), 2)
    return shared.data[places].view(np.uint16).reshape(count, 16)


class Products:
    """Of one warp, the ``index``-th of its block."""

    def __init__(self, registers: Registers, transfers: Transfers, index: int, early: bool):
        self.registers, self.transfers, self.index = registers, transfers, index
        self.products = Groups(early)

    def move_matrices(self, parts: Parts, operands: Parts) -> None:
        """``ldmatrix`` and ``stmatrix``: 8x8 matrices, of whose rows eight lanes have addresses."""
        shared, load = self.transfers.shared, parts[0] == "ldmatrix"
        names = Registers.names(operands[0 if load else 1])
        addresses = self.transfers.address(operands[1 if load else 0])[1]
        for i, name in enumerate(names):
            places = shared.places(addresses[8 * i : 8 * i + 8], 16)
            if load:
                matrix = shared.data[places].view(np.uint16)
                matrix = np.ascontiguousarray(matrix.T if "trans" in parts else matrix)
                self.registers.put(name, matrix.view(np.uint32).reshape(32), EVERY_LANE)
            else:
                matrix = self.registers.get(name, "b32").copy().view(np.uint16).reshape(8, 8)
                matrix = np.ascontiguousarray(matrix.T if "trans" in parts else matrix)
                shared.data[places] = matrix.view(np.uint8)

    def transpose(self, operands: Parts) -> None:
        """``movmatrix``."""
        matrix = self.registers.get(operands[1], "b32").copy().view(np.uint16).reshape(8, 8)
        found = np.ascontiguousarray(matrix.T).view(np.uint32).reshape(32)
        self.registers.put(operands[0], found, EVERY_LANE)

    def multiply(self, parts: Parts, operands: Parts) -> None:
        """``mma`` m16n8k16."""
        if "m16n8k16" not in parts:
            raise MachineError("not known here")
        names = [Registers.names(operand) for operand in operands]
        a, b = ([self.registers.get(name, "b32") for name in each] for each in names[1:3])
        right = np.zeros((8, 16), np.uint16)
        for i, register in enumerate(b):
            right[ROWS, PAIRS + 8 * i] = register & 0xFFFF
            right[ROWS, PAIRS + 8 * i + 1] = register >> 16
        product = numbers(left_fragment(a), parts) @ numbers(right, parts).T
        for i, (to, addend) in enumerate(zip(names[0], names[3], strict=True)):
            total = self.registers.get(addend, "f32") + product[sum_place(i)]
            self.registers.put(to, total, EVERY_LANE)

    def start(self, parts: Parts, operands: Parts) -> None:
        """``wgmma.mma_async``: the warp's 16 of 64 rows, now or when they are waited for."""
        sums, add = Registers.names(operands[0]), self.registers.predicate(operands[3])
        columns = int(re.sub(r"m64n(\d+)k16", r"\1", parts[4]))
        right = int(self.registers.get(operands[2], "b64")[0])
        *_, right_by_columns = (int(operand) for operand in operands[4:])
        fragment = None
        if operands[1].startswith("{"):
            names = Registers.names(operands[1])
            fragment = left_fragment([self.registers.get(name, "b32").copy() for name in names])
        else:
            described = int(self.registers.get(operands[1], "b64")[0])
            left_by_columns = int(operands[6])

        def perform() -> None:
            shared, left = self.transfers.shared, fragment
            if left is None:
                rows = shared_operand(shared, described, 64, not left_by_columns)
                left = rows[self.index % 4 * 16 :][:16]
            b = numbers(shared_operand(shared, right, columns, not right_by_columns), parts)
            product = numbers(left, parts) @ b.T
            for i, name in enumerate(sums):
                found = product[sum_place(i)]
                total = np.where(add, self.registers.get(name, "f32") + found, found)
                self.registers.put(name, total.astype(np.float32), EVERY_LANE)

        self.products.start(perform)

    def asynchronous(self, parts: Parts, operands: Parts) -> None:
        """``wgmma``: products, groups of these, and waiting for all but the latest."""
        if parts[1] == "mma_async":
            self.start(parts, operands)
        elif parts[1] == "commit_group":
            self.products.commit()
        elif parts[1] == "wait_group":
            self.products.wait(int(operands[0], 0))
