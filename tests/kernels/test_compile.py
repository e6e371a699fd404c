"""Ahead-of-time compilation of what serving would launch; no GPU needed, only Triton's ptxas."""

from __future__ import annotations

from typing import Any

import pytest
import triton

from recalkv_vllm.benchmarks.compile_report import Case, Row, summary
from recalkv_vllm.benchmarks.sass import Loop, longest_loop
from tests.kernels.reports import rows_of

CASE = Case("llama-3.1-8b", 0.5, 1, "split")


def report(*arguments: str) -> list[dict[str, Any]]:
    """Rows of decode with one head per group; asserts that none has faults."""
    decode = ("--group-size", "1", "--mode", "decode")
    rows = rows_of("compile_report", *arguments, *decode)
    assert not any(row["faults"] for row in rows)
    return rows


@pytest.mark.parametrize(
    ("geometry", "spans", "latent_dtype"),
    [
        (CASE.geometry, ("split", "joint", "nested"), "bf16"),
        (CASE.geometry, ("split", "joint"), "int4"),
        (CASE.geometry, ("split", "joint"), "bands"),
        ("qwen3-8b", ("split",), "bf16"),
    ],
)
def test_kernels_compile_without_spills(
    geometry: str, spans: tuple[str, ...], latent_dtype: str
) -> None:
    """The layouts that matter most, int4, bands and a key norm; the command itself has them all."""
    layouts = ("--geometry", geometry, "--compression", "0.5", "--spans", *spans)
    rows = report(*layouts, "--latent-dtype", latent_dtype)
    kernels = 9 if geometry == "qwen3-8b" else 8  # its key scales
    assert len(rows) == 3 * len(spans) * kernels
    attention = [row for row in rows if row["kernel"] == "latent_attention"]
    instructions = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}
    assert all(instructions[row["arch"]] in row["tensor_core"] for row in attention)
    for row in attention:
        if row["arch"] == 90:
            # Codes of a joint span leave no registers for the tile-local rotation's table.
            rotated = row["case"]["spans"] == "split" or latent_dtype == "bf16"
            assert f"tile=64 local_rope={rotated:d}" in row["config"]


def test_what_spills_by_the_rules_is_compiled_leaner() -> None:
    layout = ("--geometry", CASE.geometry, "--compression", "0.25", "--spans", "split")
    rows = report(*layout, "--latent-dtype", "int4", "--arch", "90")
    attention = [row["config"] for row in rows if row["kernel"] == "latent_attention"]
    assert len(attention) == 2
    if triton.__version__.startswith("3.7"):  # which spills with three, those of the rules
        assert all("stages=1" in config for config in attention)


def test_bands_compile_without_spills_for_many_queries() -> None:
    """On sm_100, where eight warps hold 64 rows of other latents."""
    layout = ("--geometry", "llama-2-7b", "--compression", "0.5", "--spans", "joint")
    launched = ("--group-size", "1", "--latent-dtype", "bands", "--mode", "prefill")
    rows = rows_of("compile_report", *layout, *launched, "--arch", "100")
    assert [row["kernel"] for row in rows] == ["latent_attention", "project_values"]
    assert not any(row["faults"] for row in rows)


def test_many_bands_beside_streamed_keys_compile_without_spills() -> None:
    """On sm_80, where 512 value columns leave the fewest registers to the streamed factor."""
    layout = ("--geometry", "qwen2.5-7b", "--compression", "0.5", "--group-size", "4")
    bands = ("--spans", "nested", "--latent-dtype", "bands", "--band-bits", "8", "6", "4", "3", "2")
    rows = rows_of("compile_report", *layout, *bands, "--mode", "verify", "--arch", "80")
    attention = [row for row in rows if row["kernel"] == "latent_attention"]
    assert attention
    for row in attention:
        assert "v_block=512" in row["config"]
        if triton.__version__.startswith("3.7"):  # which spills with all parameters before
            assert "late_values=1" in row["config"]


#: Two loops, one in the other, and an access to spilled registers before them.
SASS = """
        /*0000*/                   STL [R1], R5 ;                 /* 0x0000000501007387 */
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0020*/                   HMMA.16816.F32 R4, R8, R2, R4 ;
        /*0030*/              @P1  BRA 0x20 ;
        /*0040*/                   LDL R5, [R1] ;
        /*0050*/               @P0 BRA 0x10 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70;
"""


def test_the_longest_loop_is_read() -> None:
    assert longest_loop(SASS) == Loop(instructions=5, spills=1, warp_flop=2 * 16 * 8 * 16)
    straight = SASS.replace("BRA 0x10", "BRA 0x60").replace("BRA 0x20", "BRA 0x60")
    assert longest_loop(straight) == Loop(0, 0)


@pytest.mark.parametrize(
    ("kernel", "spills", "shared", "tensor_core", "faults"),
    [
        ("latent_attention", 0, 1000, "mma.sync", []),
        ("merge_pieces", 0, 0, "", []),
        ("latent_attention", 8, 1000, "mma.sync", ["8 bytes spilled, 0 accesses per tile"]),
        ("latent_attention", 0, 166913, "mma.sync", ["166913 of 166912 bytes of shared memory"]),
        ("project_values", 0, 1000, "", ["no tensor-core instruction"]),
    ],
)
def test_faults(kernel: str, spills: int, shared: int, tensor_core: str, faults: list[str]) -> None:
    row = Row(CASE, "decode", 80, kernel, "", 255, spills, shared, tensor_core)
    assert row.faults() == faults


def test_summary_names_triton_and_what_spills() -> None:
    rows = [
        Row(CASE, "decode", 90, "latent_attention", "", 255, spills, 1000, "wgmma", 60.0, accesses)
        for spills, accesses in ((0, 0), (8, 0), (24, 2))
    ]
    told = summary(rows, 90)
    assert told.startswith(f"Triton {triton.__version__} sm_90: 3 launches, 2 with faults")
    assert told.endswith("2 spill up to 24 bytes, 1 of them within the loop")
