"""Loads, stores and asynchronous copies (PTX ISA, "Data Movement and Conversion Instructions")."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.ptx.groups import Groups, Work
from tests.ptx.memory import Global, MachineError, Shared
from tests.ptx.program import Parts
from tests.ptx.registers import BITS, TYPES, Registers

#: Addresses of parameters; those of shared memory are its offsets.
PARAMETERS = 1 << 60
SHARED_END = np.uint64(1 << 32)


class Transfers:
    """What a warp moves between its registers and memory.

    Args:
        parameters: bytes of each parameter, by its name.
        deliver: takes what an asynchronous copy does, to be done sometime.
        early: copies that a warp waits for are made when they start.
    """

    def __init__(
        self,
        registers: Registers,
        shared: Shared,
        memory: Global,
        parameters: dict[str, bytes],
        deliver: Callable[[Work], None],
        early: bool,
    ):
        self.registers, self.shared, self.memory = registers, shared, memory
        self.parameters, self.deliver = parameters, deliver
        self.copies = Groups(early)

    def address(self, operand: str) -> tuple[str, np.ndarray]:
        """The parameter, or an empty name, and addresses of ``[register + offset]``."""
        match = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if match is None:
            raise MachineError(f"{operand}: not an address")
        name, offset = match[1], np.uint64(int(match[2] or 0) & (1 << 64) - 1)
        if name in self.parameters:
            return name, np.full(32, offset)
        if not name.startswith("%"):
            return "", np.full(32, offset)  # the symbol of shared memory
        base = self.registers.values[name].astype(np.uint64)
        if (base >= PARAMETERS).all():
            return next(iter(self.parameters)), base - np.uint64(PARAMETERS) + offset
        return "", base + offset

    def load(self, parts: Parts, operands: Parts, lanes: np.ndarray) -> None:
        names = Registers.names(operands[0])
        dtype = np.dtype(TYPES[parts[-1]])
        size = dtype.itemsize * len(names)
        parameter, addresses = self.address(operands[1])
        if parameter:
            start = int(addresses[0])
            data = np.frombuffer(self.parameters[parameter][start : start + size], np.uint8)
            data = np.tile(data, (32, 1))
        elif "shared" in parts[1] or (addresses[lanes] < SHARED_END).all():
            data = self.shared.load(addresses, size, lanes)
        else:
            data = self.memory.load(addresses, size, lanes)
        values = np.ascontiguousarray(data).view(dtype)
        for i, name in enumerate(names):
            self.registers.put_extended(name, values[:, i], lanes)

    def store(self, parts: Parts, operands: Parts, lanes: np.ndarray) -> None:
        size = np.dtype(TYPES[parts[-1]]).itemsize
        names = Registers.names(operands[1])
        values = np.stack([self.registers.get(name, f"b{8 * size}") for name in names], 1)
        data = np.ascontiguousarray(values.astype(BITS[size])).view(np.uint8)
        target = self.shared if "shared" in parts[1] else self.memory
        target.store(self.address(operands[0])[1], data, lanes)

    def copy(self, parts: Parts, operands: Parts, lanes: np.ndarray) -> None:
        """``cp.async`` of each lane, the groups of these, and waiting for all but the latest."""
        if parts[2] == "commit_group":
            self.copies.commit()
        elif parts[2] == "wait_group":
            self.copies.wait(int(operands[0], 0))
        else:
            self.copies.start(self.chunks(operands, lanes))

    def chunks(self, operands: Parts, lanes: np.ndarray) -> Work:
        """Copies of a few bytes by each lane; bytes past the given count are 0."""
        to, source = (self.address(operand)[1] for operand in operands[:2])
        size = int(operands[2], 0)
        count = self.registers.get(operands[3] if len(operands) > 3 else operands[2], "u32")
        lanes = lanes.copy()
        data = self.memory.load(source, size, lanes & (count > 0))
        data[np.arange(size) >= count[:, None]] = 0
        self.shared.places(to[lanes], size)  # faults are at the instruction

        def copy() -> None:
            self.shared.store(to, data, lanes)

        return copy

    def copy_bulk(self, operands: Parts, lane: int) -> tuple[int, Work]:
        """How many bytes ``cp.async.bulk`` copies, and their copy."""
        to, source = (int(self.address(operand)[1][lane]) for operand in operands[:2])
        size = int(self.registers.get(operands[2], "u32")[lane])
        if to % 16 or source % 16 or size % 16:
            raise MachineError("a misaligned bulk copy")
        starts = np.arange(0, size, 16, dtype=np.uint64)
        data = self.memory.load(starts + np.uint64(source), 16, np.ones(len(starts), bool))
        places = self.shared.places(starts + np.uint64(to), 16)

        def copy() -> None:
            self.shared.data[places] = data

        return size, copy
