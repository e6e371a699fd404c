"""That ``make test-asan`` tests what it says: a sanitised extension, which sees an overflow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import recalkv_vllm
from recalkv_vllm.ops import cpu

pytestmark = pytest.mark.skipif(
    os.environ.get("RECALKV_SANITIZE") != "1", reason="only in make test-asan"
)

#: The op without the checks before it, on factors whose rows are no multiple of any vector.
OVERFLOW = """
import torch
from recalkv_vllm.ops import cpu
isa = cpu.instruction_set(torch.float32)
torch.ops.recalkv_cpu.latent_value_up(
    torch.ones(3, 4, 20), torch.ones(2, 40, 20), None, torch.float32, isa
)
"""


def test_the_sanitised_extension_is_loaded() -> None:
    assert "build/sanitized" in recalkv_vllm.__file__
    mapped = Path("/proc/self/maps").read_text()
    (extension,) = Path(recalkv_vllm.__file__).parent.glob("_cpu.*.so")
    assert str(extension.resolve()) in mapped
    assert "libasan" in mapped
    assert "libubsan" in mapped
    assert cpu.instruction_set(torch.float32)


def test_an_overflow_is_seen(tmp_path: Path) -> None:
    # Not in the sources' directory, from which Python would import the installed extension.
    done = subprocess.run(
        [sys.executable, "-c", OVERFLOW], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer" in done.stderr
    assert "value_up" in done.stderr


def test_fresh_memory_is_poisoned() -> None:
    assert torch.empty(1000).isnan().all()
