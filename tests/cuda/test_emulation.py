"""What the emulation of Hopper's operations computes, and the mistakes that it finds."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from recalkv_vllm.ops.cuda.hopper_layout import swizzle_rows
from tests.cuda import emulation


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to compile the emulation")
    path = Path(tmp_path_factory.mktemp("machine"), "libmachine.so")
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas"]
    includes = [f"-I{emulation.HERE}", f"-I{emulation.SOURCES}"]
    source = emulation.HERE / "hopper_machine.cpp"
    subprocess.run([compiler, *flags, *includes, source, "-o", path], check=True)
    loaded = ctypes.CDLL(str(path))
    loaded.recalkv_product.restype = ctypes.c_char_p
    loaded.recalkv_shared_product.restype = ctypes.c_char_p
    return loaded


def product(
    library: ctypes.CDLL, mistake: str, early: bool, shared: bool = False
) -> tuple[str | None, torch.Tensor, torch.Tensor]:
    """What was found, the product, and the expected one; ``shared``: of slots of shared memory."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 32, generator=generator).bfloat16() for _ in range(2))
    rows = b.contiguous() if shared else swizzle_rows(b, 64)
    sums = torch.full((64, 64), torch.nan)
    addresses = [ctypes.c_void_p(x.data_ptr()) for x in (a.contiguous(), rows, sums)]
    multiply = library.recalkv_shared_product if shared else library.recalkv_product
    found = multiply(*addresses, mistake.encode(), int(early))
    return found.decode() if found else None, sums, a.float() @ b.float().T


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_product_of_swizzled_operands(library: ctypes.CDLL, early: bool, shared: bool) -> None:
    found, sums, expected = product(library, "", early, shared)
    assert found is None
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)


MISTAKES = {
    "no barrier": "a barrier that nobody initialized",
    "bytes that never come": "deadlock",
    "registers that are nobody's": "deadlock",
    "an arrival too many": "more arrivals than a barrier's phase takes",
    "a misaligned copy": "misaligned",
    "an operand outside": "an operand outside of shared memory",
    "warps at odds": "warps of a warpgroup with different products",
    "no fence": "a product without a fence",
    "no commit": "products under way",
    "an operand overwritten": "registers of a product were written before it ended",
    "a sum overwritten": "a sum was written before its products ended",
    "no wait for the product": "products under way",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_errors(library: ctypes.CDLL, mistake: str) -> None:
    found = product(library, mistake, early=False)[0]
    assert found is not None
    assert MISTAKES[mistake] in found


SHARED_MISTAKES = {
    "no fence of shared memory": "an operand that products do not know yet",
    "no meeting": "an operand that products do not know yet",
    "a misaligned operand": "a misaligned operand",
}


@pytest.mark.parametrize("mistake", SHARED_MISTAKES)
def test_mistakes_with_slots_are_errors(library: ctypes.CDLL, mistake: str) -> None:
    found = product(library, mistake, early=False, shared=True)[0]
    assert found is not None
    assert SHARED_MISTAKES[mistake] in found


@pytest.mark.parametrize("mistake", ["no wait for the copy", "a wrong parity"])
def test_what_is_not_waited_for_is_not_there(library: ctypes.CDLL, mistake: str) -> None:
    sums = product(library, mistake, early=False)[1]
    assert sums.isnan().all()
