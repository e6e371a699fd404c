"""The kernel for Hopper as nvcc compiles it: no spills, and few enough instructions."""

from __future__ import annotations

import shutil

import pytest

from recalkv_vllm.benchmarks import cuda_compiler, hopper_counts, hopper_report
from recalkv_vllm.benchmarks.hopper_report import LAYOUTS, HopperInstantiation, HopperRow
from recalkv_vllm.benchmarks.sass_paths import Code
from recalkv_vllm.cost.hopper import TOLERANCE


@pytest.fixture(scope="module")
def rows() -> dict[HopperInstantiation, HopperRow]:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc on the search path")
    wanted = sorted({layout.kernel for layout in LAYOUTS}, key=str)
    return {row.kernel: row for row in hopper_report.compile_hopper(wanted)}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_main_loop_is_within_its_budget(
    layout: hopper_report.Layout, rows: dict[HopperInstantiation, HopperRow]
) -> None:
    row = rows[layout.kernel]
    assert row.spills == 0
    consumer, *producers = hopper_report.instructions_per_tile(row.code, layout)
    assert 4 * consumer + sum(producers) <= layout.budget


def test_serialized_products_are_found() -> None:
    """As ptxas of CUDA 13.0 tells of them; it goes on with slow code."""
    message = (
        "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to non wgmma instructions defining accumulator registers of a wgmma "
        "between start and end of the pipeline stage in the function 'decode'\n"
    )
    assert cuda_compiler.serializes_products(f"ptxas info    : 0 bytes gmem\n{message}")
    assert not cuda_compiler.serializes_products("ptxas info    : Used 168 registers\n")


SASS = """
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   HGMMA R24 ;
        /*0020*/              @P0 BRA 0x60 ;
        /*0030*/                   FADD R1, R1, R2 ;
        /*0040*/                   FADD R1, R1, R2 ;
        /*0050*/                   BRA 0x80 ;
        /*0060*/                   LDGSTS.E [R1], desc[UR4][R2.64], P1 ;
        /*0070*/                   FMUL R1, R1, R2 ;
        /*0080*/                   LDS R3, [R4] ;
        /*0090*/              @P1 BRA 0x80 ;
        /*00a0*/              @P2 BRA 0x1000 ;
        /*00b0*/                   MOVM R5, R5 ;
        /*00c0*/              @P3 BRA 0x10 ;
        /*00d0*/                   EXIT ;
"""


def test_longest_way_through_a_loop() -> None:
    """Inner rounds count; ways that leave the loop or meet what is avoided do not."""
    code = Code(SASS)
    loop = code.loop_with("HGMMA", "MOVM")
    assert (loop.start, loop.stop) == (1, 13)

    def length(rounds: int | None, avoided: str) -> int:
        return code.round_length(loop, lambda inner: rounds, lambda text: avoided in text)

    assert length(1, "FMUL") == 10
    assert length(5, "FMUL") == 18
    assert length(1, "FADD") == 9
    with pytest.raises(ValueError, match="expected a way through the loop"):
        length(None, "FMUL")
    with pytest.raises(ValueError, match="expected a loop with HMMA, found none"):
        code.loop_with("HMMA")


def test_predicted_times_follow_the_slower_of_both() -> None:
    joint = LAYOUTS[0]
    assert hopper_report.predicted_time(joint, 100) == 0.5
    assert hopper_report.predicted_time(joint, 100_000) > 10


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_cost_model_knows_what_is_issued(
    layout: hopper_report.Layout, rows: dict[HopperInstantiation, HopperRow]
) -> None:
    consumer, *producers = hopper_report.instructions_per_tile(rows[layout.kernel].code, layout)
    counted = 4 * consumer + sum(producers)
    assert hopper_counts.modelled(layout) == pytest.approx(counted, rel=TOLERANCE)
