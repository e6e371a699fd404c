"""Ahead-of-time compilation of what serving would launch; no GPU needed, only Triton's ptxas."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from recalkv_vllm.benchmarks.compile_report import Case, Row

CASE = Case("llama-3.1-8b", 0.5, 1, "split")


@pytest.mark.parametrize(
    ("geometry", "spans", "latent_dtype"),
    [
        (CASE.geometry, ("split", "joint"), "bf16"),
        (CASE.geometry, ("split", "joint"), "int4"),
        (CASE.geometry, ("split", "joint"), "bands"),
        ("qwen3-8b", ("split",), "bf16"),
    ],
)
def test_kernels_compile_without_spills(
    geometry: str, spans: tuple[str, ...], latent_dtype: str
) -> None:
    """The layouts that matter most, int4, bands and a key norm; the command itself has them all."""
    arguments = ["--geometry", geometry, "--compression", "0.5", "--group-size", "1"]
    arguments += ["--spans", *spans, "--latent-dtype", latent_dtype, "--mode", "decode", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "recalkv_vllm.benchmarks.compile_report", *arguments],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) == 3 * len(spans) * 4
    assert not any(row["faults"] for row in rows)
    attention = [row for row in rows if row["kernel"] == "latent_attention"]
    instructions = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}
    assert all(instructions[row["arch"]] in row["tensor_core"] for row in attention)
    flagship = [row["config"] for row in attention if row["arch"] == 90]
    assert all("tile=64 local_rope=1" in config for config in flagship)


@pytest.mark.parametrize(
    ("kernel", "spills", "shared", "tensor_core", "faults"),
    [
        ("latent_attention", 0, 1000, "mma.sync", []),
        ("merge_splits", 0, 0, "", []),
        ("latent_attention", 8, 1000, "mma.sync", ["8 bytes spilled, 0 accesses per tile"]),
        ("latent_attention", 0, 166913, "mma.sync", ["166913 of 166912 bytes of shared memory"]),
        ("project_values", 0, 1000, "", ["no tensor-core instruction"]),
    ],
)
def test_faults(kernel: str, spills: int, shared: int, tensor_core: str, faults: list[str]) -> None:
    row = Row(CASE, "decode", 80, kernel, "", 255, spills, shared, tensor_core)
    assert row.faults() == faults
