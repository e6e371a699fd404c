"""The device code compiles for both architectures: no spills, the right instructions."""

from __future__ import annotations

import re
import shutil

import pytest

import cuda_build
from recalkv_vllm.benchmarks import cuda_compile_report as report

KERNELS = [
    report.Instantiation("BFloat16", 128, 1, 8, True),
    report.Instantiation("Float16", 64, 2, 16, True),
    report.Instantiation("BFloat16", 128, 1, 32, False),
]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on the search path")
@pytest.mark.parametrize("arch", report.ARCHES)
def test_kernels_compile_without_faults(arch: str) -> None:
    for row in report.compile_kernels(KERNELS, arch):
        assert row.faults() == [], row
        assert row.registers <= 255


def test_the_report_is_of_what_is_built() -> None:
    built = re.findall(r"code=\[?(sm_\w+)", " ".join(cuda_build.ARCHITECTURES))
    assert tuple(built) == report.ARCHES


def test_common_models_have_plans() -> None:
    rows = list(report.plan_rows())
    assert len(rows) > 100
    for row in rows:
        limits = report.LIMITS[row.device]
        assert row.plan is not None, row
        assert row.plan.shared_bytes <= limits.shared_bytes


def test_symbols_are_read() -> None:
    symbol = "_ZN7recalkv16decode_attentionINS_5ShapeINS_8BFloat16ELi128ELi1ELi16EEELb1EEEvNS_12D"
    expected = report.Instantiation("BFloat16", 128, 1, 16, True)
    assert report.Instantiation.of_symbol(symbol) == expected
    assert len(set(report.instantiations())) == 48


def test_faults_are_named() -> None:
    row = report.Row(KERNELS[0], "sm_80", 255, 8, {"HMMA": 0, "LDGSTS": 3})
    assert row.faults() == ["8 bytes spilled", "no HMMA"]
