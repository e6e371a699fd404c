"""The C++ extension and the torch that it was built against."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from recalkv_vllm.ops.cpu import extension

LIBRARY = Path(importlib.import_module("recalkv_vllm._cpu").__file__)
RELEASE = re.match(r"\d+\.\d+\.\d+", torch.__version__)[0]


def test_the_library_says_its_torch() -> None:
    assert extension.torch_at_build(LIBRARY) == RELEASE


@pytest.mark.parametrize("suffix", ["", "+cu130", "a0+git1234abc", ".dev20260101+cpu"])
def test_builds_of_one_release_are_alike(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", RELEASE + suffix)
    assert extension._load() is None


@pytest.mark.parametrize("found", [f"{RELEASE}1", "1.13.1+cpu", "unheard of"])
def test_another_torch_is_refused(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", found)
    assert extension._load() == f"built against torch {RELEASE}, found torch {found}"


def test_library_that_does_not_say_its_torch(tmp_path: Path) -> None:
    (tmp_path / "_cpu.so").write_bytes(b"\x7fELF")
    assert extension.torch_at_build(tmp_path / "_cpu.so") is None


def test_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert extension._load() == "not built; it takes a C++20 compiler"
