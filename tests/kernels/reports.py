"""Reports on compiled kernels, by the commands that print them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def rows_of(report: str, *arguments: str) -> list[dict[str, Any]]:
    """Rows of ``recalkv_vllm.benchmarks.<report>``, compiled; asserts success."""
    done = subprocess.run(
        [sys.executable, "-m", f"recalkv_vllm.benchmarks.{report}", *arguments, "--json"],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return rows
