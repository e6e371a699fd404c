"""What the warps of a block meet at: named barriers, mbarriers in shared memory, and registers that
they hand each other (PTX ISA, "Parallel Synchronization and Communication Instructions")."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.ptx.memory import MachineError

#: Of a multiprocessor.
REGISTERS = 65536


@dataclass(slots=True)
class Meeting:
    """A named barrier: threads that have come, and how often all had."""

    arrived: int = 0
    times: int = 0


@dataclass(slots=True)
class Phases:
    """An mbarrier: a phase ends once ``pending`` arrivals and ``bytes`` are no more missing."""

    arrivals: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def arrive(self, expected: int = 0) -> None:
        self.pending -= 1
        self.bytes += expected
        if self.pending < 0:
            raise MachineError("more arrivals than a phase takes")
        self.settle()

    def complete(self, count: int) -> None:
        self.bytes -= count
        self.settle()

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.arrivals


@dataclass(slots=True)
class Pool:
    """Registers of a block's warps, a thread's; ``free`` are those that warps gave back."""

    owned: list[int]
    free: int = 0

    @classmethod
    def of(cls, warps: int) -> Pool:
        return cls([min(255, REGISTERS // (32 * warps) // 8 * 8)] * warps)

    def take(self, warp: int, count: int) -> bool:
        """Have a warp own ``count``; whether there were enough."""
        if count - self.owned[warp] > self.free:
            return False
        self.free += self.owned[warp] - count
        self.owned[warp] = count
        return True


@dataclass(slots=True)
class Barriers:
    """All of a block."""

    pool: Pool
    named: dict[int, Meeting] = field(default_factory=dict)
    in_memory: dict[int, Phases] = field(default_factory=dict)

    def at(self, address: int) -> Phases:
        if address not in self.in_memory:
            raise MachineError("a barrier that nobody initialized")
        return self.in_memory[address]
