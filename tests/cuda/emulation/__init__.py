"""The CUDA kernels' own source, compiled by the host's compiler against emulated primitives."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from recalkv_vllm.ops.cuda import extension

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "csrc" / "cuda"
HERE = Path(__file__).parent


def build(directory: Path) -> Path:
    """Compile the emulation with the torch ops of ``binding.cpp``, registered for the CPU.

    Returns:
        The library, which may be there already.
    """
    library = directory / "libemulation.so"
    if library.exists():
        return library
    directory.mkdir(exist_ok=True)
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to compile the emulation of the CUDA kernels")
    torch_root = Path(torch.__file__).parent
    flags = ["-std=c++17", "-O1", "-fPIC", "-Wno-unknown-pragmas", "-DRECALKV_DISPATCH_KEY=CPU"]
    includes = [f"-I{HERE}", f"-I{SOURCES}", f"-I{torch_root / 'include'}"]

    def compiled(source: Path) -> Path:
        output = directory / f"{source.name}.o"
        command = [compiler, *flags, *includes, "-x", "c++", "-c", source, "-o", output]
        subprocess.run(command, check=True)
        return output

    sources = (*sorted(SOURCES.glob("*.cu")), SOURCES / "binding.cpp", HERE / "control.cpp")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    link = [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10", "-ldl"]
    linked = directory / "linked.so"
    subprocess.run([compiler, "-shared", *objects, *link, "-o", linked], check=True)
    return linked.rename(library)


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch that was observed; ``parameters`` are the bytes of the kernel's only one."""

    symbol: str
    grid: tuple[int, int]
    threads: int
    shared_bytes: int
    parameters: bytes


#: The library once it is loaded.
loaded: ctypes.CDLL | None = None


def load(library: Path) -> Callable[[int, int], None]:
    """Load the emulation's torch ops; returns ``configure(seed, early_copies)``."""
    global loaded
    extension.load_library(str(library))
    loaded = ctypes.CDLL(str(library))
    configure = loaded.recalkv_emulate
    configure.argtypes = [ctypes.c_uint32, ctypes.c_int]
    configure.restype = None
    return configure


@contextmanager
def observed() -> Iterator[list[Launch]]:
    """Launches do not run, but are in the list."""
    launches: list[Launch] = []
    numbers, pointer = [ctypes.c_int] * 4, ctypes.c_void_p

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p, *numbers, pointer, ctypes.c_int)
    def observe(symbol, x, y, threads, shared_bytes, parameters, size) -> None:
        content = ctypes.string_at(parameters, size)
        launches.append(Launch(symbol.decode(), (x, y), threads, shared_bytes, content))

    assert loaded is not None
    loaded.recalkv_observe(observe)
    try:
        yield launches
    finally:
        loaded.recalkv_observe(None)
