"""Launches of the CUDA kernels, compiled by nvcc and run on the machine."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from recalkv_vllm.benchmarks.cuda_compile_report import Instantiation
from recalkv_vllm.benchmarks.cuda_compiler import run_nvcc
from recalkv_vllm.benchmarks.hopper_report import HopperInstantiation
from tests.cuda.emulation import Launch
from tests.ptx.block import Grid, Order, run_grid
from tests.ptx.memory import Global
from tests.ptx.program import Program, entries, parse


@cache
def program_of(symbol: str) -> Program:
    """What nvcc makes of a kernel, by its mangled name."""
    header = "hopper_decode.cuh" if "HopperShape" in symbol else "decode.cuh"
    kernel = HopperInstantiation if "HopperShape" in symbol else Instantiation
    found = kernel.of_symbol(symbol)
    assert found is not None
    with TemporaryDirectory() as directory:
        ptx = Path(directory, "kernel.ptx")
        run_nvcc(header, found.source(), "compute_90a", ptx, "-ptx")
        return parse(entries(ptx.read_text())[symbol])


def run_launch(launch: Launch, tensors: Iterable[torch.Tensor], order: Order) -> None:
    """Run a launch on the tensors that it was given."""
    grid = Grid((*launch.grid, 1), launch.threads, launch.shared_bytes, (launch.parameters,))
    run_grid(program_of(launch.symbol), grid, Global.of(tensors), order)
