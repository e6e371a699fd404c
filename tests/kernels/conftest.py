"""Kernel tests run on the GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from recalkv_vllm.ops import workspace


def to_bits(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, rounding to nearest even as a GPU does."""
    rounded = torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def from_bits(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


def widen(x: TensorHandle) -> TensorHandle:
    return TensorHandle(from_bits(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x


@pytest.fixture(autouse=True, scope="session")
def bfloat16() -> Iterator[None]:
    """Works around the interpreter of Triton 3.6 to 3.9, which holds bfloat16 as its bits.

    Its ``create_dot`` multiplies those bits as integers, and its ``cast_impl`` truncates where the
    compiled kernel rounds to nearest. To go once it does neither.
    """
    if torch.cuda.is_available():
        yield
        return
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self, a, b, *rest):
        return dot(self, widen(a), widen(b), *rest)

    def cast_impl(self, source, dst_type):
        types = (source.dtype.scalar, dst_type.scalar)
        if types == (tl.float32, tl.bfloat16):
            return TensorHandle(to_bits(source.data), tl.bfloat16)
        if types == (tl.bfloat16, tl.float32):
            return widen(source)
        return cast(self, source, dst_type)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
    yield
    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = dot, cast


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every new tensor starts as NaN, so that an output or workspace left unwritten shows."""

    def new_workspace(device: torch.device, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)  # all ones: NaN in float32

    monkeypatch.setattr(workspace, "reserve_workspace", new_workspace)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
