"""Compiling instantiations of the CUDA kernels with nvcc, and reading their machine code."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"


@dataclass(frozen=True, slots=True)
class Compiled:
    """What nvcc and ptxas said, and the disassembled code of every kernel by its symbol."""

    messages: str
    code: dict[str, str]


def find_tool(name: str) -> str:
    """Path of a CUDA tool: on the search path, or Triton's own copy.

    Raises:
        FileNotFoundError: neither is there.
    """
    if (path := shutil.which(name)) is not None:
        return path
    try:
        from triton.backends import nvidia
    except ImportError:
        raise FileNotFoundError(f"{name}: not on the search path") from None
    path = Path(nvidia.__path__[0]) / "bin" / name
    if not path.is_file():
        raise FileNotFoundError(f"{name}: expected on the search path or at {path}")
    return str(path)


def serializes_products(messages: str) -> bool:
    """Whether ptxas says that it had to serialize asynchronous products."""
    return re.search(r"wgmma.*serialized", messages) is not None


def run_nvcc(header: str, instantiations: str, arch: str, output: Path, *options: str) -> str:
    """Compile explicit instantiations of what a header of ``csrc/cuda`` has; nvcc's messages.

    Args:
        output: written, and beside it the source.

    Raises:
        FileNotFoundError: no nvcc.
        RuntimeError: it fails; with its output.
    """
    source = output.with_suffix(".cu")
    source.write_text(f'#include "{header}"\nnamespace recalkv {{\n{instantiations}}}\n')
    command = [find_tool("nvcc"), "-std=c++17", "-O3", f"-I{SOURCES}", f"-arch={arch}"]
    command += [*options, "-o", str(output), str(source)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    if compiled.returncode:
        raise RuntimeError(f"nvcc: {compiled.stderr}")
    return compiled.stderr


def compile_source(header: str, instantiations: str, arch: str) -> Compiled:
    """Compile explicit instantiations of what a header of ``csrc/cuda`` has, in one run of nvcc.

    Args:
        arch: such as ``sm_90a``.

    Raises:
        FileNotFoundError: a tool is missing.
        RuntimeError: nvcc fails, or ptxas had to serialize asynchronous products; with its output.
    """
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory, "kernels.cubin")
        messages = run_nvcc(header, instantiations, arch, cubin, "-cubin", "-Xptxas", "-v")
        if serializes_products(messages):
            raise RuntimeError(f"nvcc: {messages}")
        command = [find_tool("cuobjdump"), "-sass", str(cubin)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = re.findall(
        r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", listing, flags=re.DOTALL
    )
    return Compiled(messages, dict(functions))
