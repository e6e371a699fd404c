"""What Triton compiles for sm_90 gives the reference's results, whatever order warps run in."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("latent_dtype", ["auto", "bands"])
def test_compiled_launches(latent_dtype: str) -> None:
    """In a process of its own, for this one's Triton interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.ptx.triton_kernels", latent_dtype],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("agrees") == 2
