"""The CUDA kernels on the GPU if there is one that can run them, else emulated on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from filelock import FileLock

from recalkv_vllm.ops import workspace
from recalkv_vllm.ops.cuda import attention, extension
from recalkv_vllm.ops.cuda.shapes import Limits
from tests.cuda import emulation

ON_GPU = torch.cuda.is_available() and extension.load_error is None


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every new tensor starts as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], None]:
    if ON_GPU:
        return lambda seed, early_copies: None
    if torch.cuda.is_available():
        pytest.skip("needs the CUDA extension, for compiled Triton cuts batches")
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the run's, so that one worker compiles for all
    with FileLock(root / "emulation.lock"):
        return emulation.load(emulation.build(root / "emulation"))


@pytest.fixture
def configure(
    emulator: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> Callable[[int, int], None]:
    """Route ``ops.cuda`` to the emulation; returns ``configure(seed, early_copies)``.

    Plans are made for few multiprocessors, so that short sequences are cut too.
    """

    def poisoned_workspace(device: torch.device, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes // 4,), torch.nan, device=device).view(torch.uint8)

    if not ON_GPU:
        monkeypatch.setattr(
            attention, "device_limits", lambda device: Limits(6, 227 << 10, 228 << 10)
        )
    monkeypatch.setattr(workspace, "reserve_workspace", poisoned_workspace)
    monkeypatch.setenv("RECALKV_KERNEL", "cuda")
    emulator(0, 0)
    return emulator


@pytest.fixture
def cutting(
    multiprocessors: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> Callable[[bool], None]:
    """``cutting(True)`` makes plans for many multiprocessors; else no batch is cut into pieces."""

    def choose(cut: bool) -> None:
        multiprocessors(200)
        if not cut:
            monkeypatch.setattr(attention, "batch_bounds", lambda *_: None)

    return choose


@pytest.fixture
def multiprocessors(
    configure: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch, device: str
) -> Callable[[int], None]:
    """``multiprocessors(n)`` makes plans for a device with ``n`` of them."""
    limits = attention.device_limits(torch.device(device))

    def set_count(count: int) -> None:
        changed = Limits(count, limits.shared_bytes, limits.shared_bytes_per_multiprocessor)
        monkeypatch.setattr(attention, "device_limits", lambda device: changed)

    return set_count
