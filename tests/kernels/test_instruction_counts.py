"""What the cost model says of kernels, against compiled ones; only Triton's ptxas is needed."""

from __future__ import annotations

import pytest
import triton

from recalkv_vllm.benchmarks.compile_report import TARGETS, Case
from recalkv_vllm.benchmarks.instruction_counts import Count, fitted, layer_cost
from recalkv_vllm.benchmarks.sass import longest_loop
from recalkv_vllm.cost.triton import COUNTED, TOLERANCE, TRITON, Instructions, triton_spends
from tests.kernels.reports import rows_of


@pytest.mark.skipif(
    not triton.__version__.startswith(TRITON), reason=f"counted with Triton {TRITON}"
)
def test_counts_are_those_of_compiled_kernels() -> None:
    arguments = ["--arch", "90", "--geometry", "llama-3.1-8b", "--group-size", "1", "2"]
    rows = rows_of("instruction_counts", *arguments, "--compression", "0.5")
    assert len(rows) == 2 * 3 * 2
    assert {tuple(row["kind"]) for row in rows} == {(9, 64, False), (9, 64, True), (9, 32, True)}
    for row in rows:
        assert row["modelled"] == pytest.approx(row["counted"], rel=TOLERANCE)
    told = [row for row in rows if row["flop"]]
    assert len(told) == len(rows) - 1  # one streams its factor
    for row in told:
        # Chunks of fewer than 64 columns, and rows that are padded, take a little more.
        assert row["flop"] == pytest.approx(row["modelled_flop"], rel=0.2)


def test_every_kind_of_kernel_is_counted() -> None:
    for arch in TARGETS:
        for spans in ("split", "joint", "nested"):
            for size in (1, 2, 4, 8):
                for dtype in ("bf16", "bands"):
                    layer = layer_cost(Case("llama-3.1-8b", 0.5, size, spans, dtype))
                    assert triton_spends(layer, arch) is not None
    assert {kind[0] for kind in COUNTED} == {arch // 10 for arch in TARGETS}


def test_a_fit_finds_constants_that_there_are() -> None:
    true = Instructions(20.0, 0.0, 0.5)
    counts = [
        Count(
            Case("llama-3.1-8b", 0.5, 1, "joint"),
            90,
            (9, 64, False),
            true.fixed + true.per_column * columns,
            0.0,
            0.0,
            0.0,
            (dim, columns),
        )
        for dim in (64, 128)
        for columns in (64, 96, 256)
    ]
    found = fitted(counts)
    assert found.fixed == pytest.approx(20)
    assert found.per_dim == pytest.approx(0, abs=1e-9)
    assert found.per_column == pytest.approx(0.5)


def test_products_are_read_off_machine_code() -> None:
    sass = "\n".join(
        f"        /*{16 * i:04x}*/                   {text} ;"
        for i, text in enumerate(
            (
                "HGMMA.64x128x16.F32.BF16 R4, R8, gdesc[UR4], R4",
                "HMMA.16816.F32.BF16 R4, R8, R2, R4",
                "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR9], idesc[UR10], UP0",
                "@P0 BRA 0x0",
            )
        )
    )
    loop = longest_loop(sass)
    assert loop.warp_flop == 2 * 64 * 128 * 16 / 4 + 2 * 16 * 8 * 16
    assert loop.thread_products == 1
