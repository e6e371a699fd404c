"""Which extensions an installation builds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import os, sys, torch
from torch.utils import cpp_extension
torch.version.cuda = sys.argv[1] or None
cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"]
from setuptools import distutils
built = distutils.core.run_setup("setup.py", ["--quiet", "--name"], stop_after="init").ext_modules
print(*(each.name for each in built))
"""


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "expected", "told"),
    [
        ("13.0", "Cuda compilation tools, release 13.1, V13.1.80", {"_cpu", "_cuda"}, ""),
        ("12.8", "Cuda compilation tools, release 13.1, V13.1.80", {"_cpu"}, "expected CUDA 12"),
        ("12.8", "something else", {"_cpu"}, "found something else"),
        ("12.8", None, {"_cpu"}, "no nvcc"),
        ("", "Cuda compilation tools, release 13.1, V13.1.80", {"_cpu"}, "without CUDA"),
    ],
    ids=["same", "other-major", "unknown", "none", "cpu-torch"],
)
def test_cuda_kernels_are_built_where_they_can_be(
    torch_cuda: str, nvcc: str | None, expected: set[str], told: str, tmp_path: Path
) -> None:
    """An nvcc that does not fit torch costs the CUDA kernels, not the installation."""
    if nvcc is not None:
        tool = tmp_path / "bin" / "nvcc"
        tool.parent.mkdir()
        tool.write_text(f"#!/bin/sh\necho '{nvcc}'\n")
        tool.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, torch_cuda],
        cwd=ROOT,
        env={**os.environ, "CUDA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {name.rpartition(".")[2] for name in done.stdout.split()} == expected
    lines = [line for line in done.stderr.splitlines() if "CUDA kernels are not built" in line]
    assert len(lines) == (0 if "_cuda" in expected else 1)
    assert told in "".join(lines)
