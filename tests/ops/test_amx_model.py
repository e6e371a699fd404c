"""The software model of AMX: mistakes of kernels show on it, and it computes what AMX does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.ops import amx_model
from tests.ops.cases import CASES, AttentionCase, attend, build, spanned
from tests.ops.checks import assert_matches_oracle
from tests.ops.cpu_versions import VERSIONS

pytestmark = pytest.mark.skipif(
    not amx_model.compilable(), reason="the model needs g++, and AVX-512 with BF16 and VBMI"
)

PRODUCT = "amx_product.h"
#: A mistake in ``amx_product.h``, by the text that it takes the place of.
MISTAKES = {
    "the last units left out": ("if (k < depth) {", "if (k > depth) {"),
    "shapes of an earlier product": ("rows == rows_ && rest == rest_", "rows == rows_"),
    "columns out of place": ("amx::store<j>(block_ + j", "amx::store<j>(block_ + (j ^ 1)"),
    "rows of a too close": ("load<kA>(a.units + k, a_bytes)", "load<kA>(a.units + k, 64)"),
    "registers never given a shape": ("    amx::configure(shapes);\n", ""),
}
#: Keys of several rows, a rest of units, and rows that no register's are a multiple of.
CASE = spanned("mistakes", (6, 2, 64), 1, 48, 1, 80, batch=((1, 45), (3, 50), (13, 47)))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = MISTAKES[mistake]
    source = (amx_model.SOURCES / PRODUCT).read_text()
    assert source.count(right) == 1
    sources = shutil.copytree(amx_model.SOURCES, tmp_path / "cpu")
    (sources / PRODUCT).write_text(source.replace(right, wrong))
    name = f"amx_with_{mistake.replace(' ', '_')}"
    amx_model.build(tmp_path / "wrong.so", name, sources=sources, options=["-O1"])
    amx_model.load(tmp_path / "wrong.so")
    monkeypatch.setenv("RECALKV_CPU_ISA", name)
    with pytest.raises((AssertionError, RuntimeError), match=r"error .* allowed|tile registers"):
        assert_matches_oracle(attend(build(CASE, torch.bfloat16)), CASE, torch.bfloat16)


@pytest.mark.skipif(("amx_bf16", torch.bfloat16) not in VERSIONS, reason="needs AMX")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_as_the_processor(case: AttentionCase, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = build(case, torch.bfloat16)
    monkeypatch.setenv("RECALKV_CPU_ISA", "amx_bf16")
    hardware = attend(inputs)
    monkeypatch.setenv("RECALKV_CPU_ISA", amx_model.NAME)
    for ours, expected in zip(attend(inputs), hardware, strict=True):
        # Compilers contract differently: a key may be rounded to the neighboring bf16.
        torch.testing.assert_close(ours, expected, rtol=2e-3, atol=2e-3, equal_nan=True)
