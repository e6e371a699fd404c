"""Imports that may fail in any way, in a process of their own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

#: Seconds of a process: a slow disk takes minutes to import vLLM.
TIMEOUT = 600.0


def probe(names: Sequence[str], timeout: float = TIMEOUT) -> dict[str, dict[str, Any]]:
    """Run probes one after the other; what follows one that ends its process runs in another.

    Args:
        names: of :data:`recalkv_vllm.environment.probes.PROBES`.
        timeout: seconds of a process.

    Returns:
        What each probe found, or ``{"error": LINE}``.
    """
    found: dict[str, dict[str, Any]] = {}
    while missing := [name for name in names if name not in found]:
        command = [sys.executable, "-m", "recalkv_vllm.environment.probes", *missing]
        lines, end = _run(command, timeout)
        found |= dict(zip(missing, map(json.loads, lines), strict=False))
        if len(lines) < len(missing):
            found[missing[len(lines)]] = {"error": end}
    return found


def _run(command: Sequence[str], timeout: float) -> tuple[list[bytes], str]:
    """Whole lines of its output, and how the process ended."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as stopped:
        return (stopped.stdout or b"").split(b"\n")[:-1], f"takes longer than {timeout:g} seconds"
    code = done.returncode
    end = signal.Signals(-code).name if code < 0 else f"status {code}"
    return done.stdout.split(b"\n")[:-1], f"ends its process with {end}"
