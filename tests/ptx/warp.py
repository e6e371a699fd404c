"""One warp: 32 lanes that go through a program, each with its own place in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from tests.ptx.arithmetic import execute
from tests.ptx.barriers import Barriers, Meeting, Phases
from tests.ptx.memory import MachineError
from tests.ptx.products import Products
from tests.ptx.program import Instruction, Parts, Program
from tests.ptx.registers import EVERY_LANE, Registers
from tests.ptx.transfers import Transfers

#: Whether what a warp waits for has come.
Condition = Callable[[], bool]
AT_ONCE: Condition = lambda: True  # noqa: E731
NOTHING = frozenset({"fence", "nop", "membar"})


class Warp:
    """A warp of a block of ``threads``, the ``index``-th."""

    def __init__(
        self,
        program: Program,
        registers: Registers,
        transfers: Transfers,
        barriers: Barriers,
        index: int,
        threads: int,
        early: bool,
    ):
        self.program, self.registers, self.transfers = program, registers, transfers
        self.barriers, self.index, self.threads = barriers, index, threads
        self.products = Products(registers, transfers, index, early)
        self.executed = 0
        self.place = 0

    @property
    def instruction(self) -> Instruction:
        return self.program.instructions[self.place]

    def run(self, most: int = 2_000_000) -> Iterator[Condition]:
        """Execute until all lanes have ended; yields what must come before the next instruction.

        Lanes that parted meet again where the ones behind come to the others' place.

        Raises:
            MachineError: a fault, or more than ``most`` instructions.
        """
        end = len(self.program.instructions)
        places = np.zeros(32, np.int64)
        while (place := int(places.min())) < end:
            self.place, self.executed = place, self.executed + 1
            line = self.instruction
            active = places == place
            if active.all():
                active = EVERY_LANE
            lanes = active
            if line.guard is not None:
                guard = self.registers.predicate(f"{'!' * line.negated}{line.guard}")
                lanes = guard if active is EVERY_LANE else guard & active
            places[active] = place + 1
            try:
                if self.executed > most:
                    raise MachineError(f"more than {most} instructions")
                if line.parts[0] == "bra":
                    places[lanes] = self.program.target(line.operands[0], line.scope)
                elif line.parts[0] in ("ret", "exit"):
                    places[lanes] = end
                elif (condition := self.step(line, lanes, active)) is not None:
                    yield condition
            except (MachineError, KeyError, ValueError) as error:
                raise MachineError(f"warp {self.index}: {error} at {line.text}") from error
        if self.transfers.copies.under_way or self.products.products.under_way:
            raise MachineError(f"warp {self.index} ended with work that nobody waited for")

    def step(self, line: Instruction, lanes: np.ndarray, active: np.ndarray) -> Condition | None:
        """Any other instruction; what to wait for, if anything."""
        parts, operands = line.parts, line.operands
        name = parts[0]
        if "aligned" in parts and active is not EVERY_LANE:
            raise MachineError("lanes of a warp have parted")
        if name in NOTHING or parts[:2] == ("bar", "warp"):
            return None
        if name in ("ld", "st"):
            (self.transfers.load if name == "ld" else self.transfers.store)(parts, operands, lanes)
        elif name in ("ldmatrix", "stmatrix"):
            self.products.move_matrices(parts, operands)
        elif name == "movmatrix":
            self.products.transpose(operands)
        elif name == "mma":
            self.products.multiply(parts, operands)
        elif name == "wgmma":
            self.products.asynchronous(parts, operands)
        elif name == "cp":
            self.copy(parts, operands, lanes)
        elif name == "mbarrier":
            return self.phases(parts, operands, lanes)
        elif name in ("bar", "barrier"):
            return self.meet(operands)
        elif name == "setmaxnreg":
            count = int(operands[0], 0)
            return lambda: self.barriers.pool.take(self.index, count)
        else:
            execute(self.registers, parts, operands, lanes)
        return None

    def meet(self, operands: Parts) -> Condition:
        """``bar.sync``, of the whole block unless threads are counted."""
        counts = [int(self.registers.get(operand, "u32")[0]) for operand in operands]
        threads = counts[1] if len(counts) > 1 else self.threads
        barrier = self.barriers.named.setdefault(counts[0], Meeting())
        times = barrier.times
        barrier.arrived += 32
        if barrier.arrived == threads:
            barrier.arrived, barrier.times = 0, times + 1
        return lambda: barrier.times != times

    def phases(self, parts: Parts, operands: Parts, lanes: np.ndarray) -> Condition:
        """``mbarrier``: made, arrived at, or waited for."""
        operand = operands[0] if parts[1] == "init" else operands[1]
        addresses = self.transfers.address(operand)[1][lanes]
        if parts[1] == "init":
            counts = self.registers.get(operands[1], "u32")[lanes]
            for address, count in zip(addresses, counts, strict=True):
                self.barriers.in_memory[int(address)] = Phases(int(count), int(count))
            return AT_ONCE
        barriers = [self.barriers.at(int(address)) for address in addresses]
        if parts[1] == "arrive":
            expected = np.zeros(len(barriers), np.uint32)
            if "expect_tx" in parts:
                expected = self.registers.get(operands[2], "u32")[lanes]
            for barrier, count in zip(barriers, expected, strict=True):
                barrier.arrive(expected=int(count))
            return AT_ONCE
        parities = self.registers.get(operands[2], "u32")[lanes]
        self.registers.put(operands[0], np.ones(32, bool), lanes)
        return lambda: all(
            barrier.phase % 2 != parity for barrier, parity in zip(barriers, parities, strict=True)
        )

    def copy(self, parts: Parts, operands: Parts, lanes: np.ndarray) -> None:
        """``cp.async``: those that end at an mbarrier are handed over, to end sometime."""
        if parts[2] == "bulk":
            address = self.transfers.address(operands[3])[1]
            for lane in np.flatnonzero(lanes):
                size, perform = self.transfers.copy_bulk(operands, lane)
                barrier = self.barriers.at(int(address[lane]))

                def end(perform: Callable = perform, size: int = size, barrier=barrier) -> None:
                    perform()
                    barrier.complete(size)

                self.transfers.deliver(end)
        elif parts[2] == "mbarrier":
            addresses = self.transfers.address(operands[0])[1][lanes]
            copies = self.transfers.copies.take()

            def arrive() -> None:
                for perform in copies:
                    perform()
                for address in addresses:
                    self.barriers.at(int(address)).arrive()

            self.transfers.deliver(arrive)
        else:
            self.transfers.copy(parts, operands, lanes)
