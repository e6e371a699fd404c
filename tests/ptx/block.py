"""A block of threads: its warps in any order, each as far as it can."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.ptx.barriers import Barriers, Pool
from tests.ptx.memory import Global, MachineError, Shared
from tests.ptx.program import Program
from tests.ptx.registers import LANES, Registers
from tests.ptx.transfers import PARAMETERS, Transfers
from tests.ptx.warp import AT_ONCE, Warp

#: Triton's and this project's names of shared memory.
SHARED_SYMBOLS = ("global_smem", "_ZN7recalkv14recalkv_sharedE")


@dataclass(frozen=True, slots=True)
class Grid:
    """A launch: blocks along x, y and z, threads and bytes of shared memory of each, parameters."""

    blocks: tuple[int, int, int]
    threads: int
    shared_bytes: int
    parameters: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Order:
    """What a GPU is free to do: the order of warps, and whether asynchronous work ends at once or
    as late as it may."""

    seed: int = 0
    early: bool = False


def run_grid(program: Program, grid: Grid, memory: Global, order: Order) -> int:
    """Run all blocks one after the other; returns how many instructions warps executed.

    Raises:
        MachineError: a fault, or warps that wait for each other.
    """
    width, height, depth = grid.blocks
    with np.errstate(all="ignore"):
        return sum(
            run_block(program, grid, (x, y, z), memory, order)
            for z in range(depth)
            for y in range(height)
            for x in range(width)
        )


def run_block(
    program: Program, grid: Grid, block: tuple[int, int, int], memory: Global, order: Order
) -> int:
    """Run one block; see :func:`run_grid`."""
    chance = random.Random(f"{order.seed} {block}")
    under_way: list[Callable[[], None]] = []

    def deliver(perform: Callable[[], None]) -> None:
        if order.early:
            perform()
        else:
            under_way.append(perform)

    warps = make_warps(program, grid, block, memory, deliver, order.early)
    runs = {warp.index: warp.run() for warp in warps}
    waiting = dict.fromkeys(runs, AT_ONCE)
    while runs:
        ready = [index for index in runs if waiting[index]()]
        if ready:
            index = chance.choice(ready)
            try:
                waiting[index] = next(runs[index])
            except StopIteration:
                del runs[index], waiting[index]
        elif under_way:
            under_way.pop(chance.randrange(len(under_way)))()
        else:
            stand = [f"{index}: {warps[index].instruction.text}" for index in runs]
            raise MachineError(f"deadlock in block {block}: {'; '.join(stand)}")
    return sum(warp.executed for warp in warps)


def make_warps(
    program: Program,
    grid: Grid,
    block: tuple[int, int, int],
    memory: Global,
    deliver: Callable[[Callable[[], None]], None],
    early: bool,
) -> list[Warp]:
    """The warps of a block, at the program's start."""
    count = grid.threads // 32
    shared, barriers = Shared.of(grid.shared_bytes), Barriers(Pool.of(count))
    parameters = dict(zip(program.parameters, grid.parameters, strict=True))

    def everywhere(value: int, dtype: type = np.uint32) -> np.ndarray:
        return np.full(32, value, dtype)

    warps = []
    for index in range(count):
        threads = (LANES + 32 * index).astype(np.uint32)
        special = {"%tid.x": threads, "%ntid.x": everywhere(grid.threads)}
        for axis, at, blocks in zip("xyz", block, grid.blocks, strict=True):
            special |= {f"%ctaid.{axis}": everywhere(at), f"%nctaid.{axis}": everywhere(blocks)}
        # Symbols: parameters are read through their addresses, shared memory starts at 0.
        special |= {name: everywhere(PARAMETERS, np.uint64) for name in parameters}
        special |= dict.fromkeys(SHARED_SYMBOLS, everywhere(0, np.uint64))
        registers = Registers(special)
        transfers = Transfers(registers, shared, memory, parameters, deliver, early)
        warps.append(Warp(program, registers, transfers, barriers, index, grid.threads, early))
    return warps
