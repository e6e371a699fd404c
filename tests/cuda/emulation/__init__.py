"""The CUDA kernels' own source, compiled by the host's compiler against emulated primitives."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
    link = [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    linked = directory / "linked.so"
    subprocess.run([compiler, "-shared", *objects, *link, "-o", linked], check=True)
    return linked.rename(library)


def load(library: Path) -> Callable[[int, int], None]:
    """Load the emulation's torch ops; returns ``configure(seed, early_copies)``."""
    extension.load_library(str(library))
    configure = ctypes.CDLL(str(library)).recalkv_emulate
    configure.argtypes = [ctypes.c_uint32, ctypes.c_int]
    configure.restype = None
    return configure
