"""The C++ kernels for AMX on a software model of its tile registers (``amx_model.h``)."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock

from recalkv_vllm.ops import cpu  # noqa: F401  (loads the extension)

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SOURCES = ROOT / "csrc" / "cpu"
NAME = "amx_bf16_model"


def compilable() -> bool:
    """Whether this machine can compile and run it: the rest of the kernels is AVX-512."""
    sets = torch.ops.recalkv_cpu.instruction_sets(torch.bfloat16)
    return shutil.which("g++") is not None and "avx512_bf16" in sets


def build(
    library: Path, name: str = NAME, sources: Path = SOURCES, options: Sequence[str] = ()
) -> None:
    """Compile the kernels into a library beside the extension, which they are added to.

    Args:
        name: of the instruction set.
        sources: ``csrc/cpu``, or a copy of it.
        options: of the compiler.
    """
    flags = ["-std=c++20", "-O2", "-fPIC", "-fopenmp", "-shared", "-Wno-maybe-uninitialized"]
    includes = [f"-I{path}" for path in (HERE, sources)]
    defines = [f'-DMODEL_NAME="{name}"']
    command = ["g++", *flags, *options, *defines, *includes, HERE / "kernels.cpp", _extension()]
    subprocess.run([*command, "-o", library], check=True)


def load(library: Path) -> None:
    """Add the instruction set that was built to those of this process."""
    ctypes.CDLL(str(library), mode=os.RTLD_NOW)


def ensure_loaded() -> None:
    """Load the model, compiled by whichever process of the tests comes first."""
    if NAME in torch.ops.recalkv_cpu.instruction_sets(torch.bfloat16):
        return
    options = ["-fsanitize=address,undefined"] if os.environ.get("RECALKV_SANITIZE") == "1" else []
    digest = hashlib.sha256(" ".join([_extension(), *options]).encode())
    for path in sorted((*SOURCES.glob("*.h"), *HERE.glob("*.h"), *HERE.glob("*.cpp"))):
        digest.update(path.read_bytes())
    library = ROOT / "build" / "amx_model" / f"{digest.hexdigest()[:16]}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(library.with_suffix(".lock")):
        if not library.exists():
            unfinished = library.with_suffix(".tmp")
            build(unfinished, options=options)
            unfinished.rename(library)
    load(library)


def _extension() -> str:
    path = importlib.import_module("recalkv_vllm._cpu").__file__
    assert path is not None
    return path
