"""The CUDA kernels' own source, compiled by the host's compiler against emulated primitives."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from recalkv_vllm.ops.cuda import extension

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "csrc" / "cuda"
HERE = Path(__file__).parent


def build(directory: Path) -> Path:
    """Compile the emulation with the torch ops of ``binding.cpp``, registered for the CPU."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to compile the emulation of the CUDA kernels")
    torch_root = Path(torch.__file__).parent
    flags = ["-std=c++17", "-O1", "-fPIC", "-Wno-unknown-pragmas", "-DRECALKV_DISPATCH_KEY=CPU"]
    includes = [f"-I{HERE}", f"-I{SOURCES}", f"-I{torch_root / 'include'}"]
    objects = []
    for source in (*sorted(SOURCES.glob("*.cu")), SOURCES / "binding.cpp", HERE / "control.cpp"):
        objects.append(directory / f"{source.name}.o")
        command = [compiler, *flags, *includes, "-x", "c++", "-c", source, "-o", objects[-1]]
        subprocess.run(command, check=True)
    library = directory / "libemulation.so"
    link = [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    subprocess.run([compiler, "-shared", *objects, *link, "-o", library], check=True)
    return library


def load(library: Path) -> Callable[[int, int], None]:
    """Load the emulation's torch ops; returns ``configure(seed, early_copies)``."""
    extension.load_library(str(library))
    configure = ctypes.CDLL(str(library)).recalkv_emulate
    configure.argtypes = [ctypes.c_uint32, ctypes.c_int]
    configure.restype = None
    return configure
