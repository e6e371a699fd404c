"""vLLM's CUDA build without a GPU: run by ``make test-cuda-stack``, which says where things are."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from vllm.platforms import current_platform

from recalkv_vllm.ops.triton.launch import Launch
from tests.cuda_stack.checkpoints import EVERY
from tests.cuda_stack.worker import Worker


@pytest.fixture(scope="session", autouse=True)
def stack() -> None:
    """The stack that these tests are about is there."""
    assert torch.version.cuda, "expected a CUDA build of torch; run: make test-cuda-stack"
    assert current_platform.is_cuda(), "expected vLLM's CUDA platform; run: make test-cuda-stack"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``checkpoint(name)``: the directory of one of ``checkpoints.EVERY``."""

    @cache
    def save(name: str) -> Path:
        return EVERY[name].save(tmp_path_factory.mktemp("checkpoints") / name)

    return save


@pytest.fixture(scope="session")
def worker(checkpoint: Callable[[str], Path]) -> Callable[[str], Worker]:
    """``worker(name)``: a worker that has loaded the checkpoint and bound its cache."""

    @cache
    def start(name: str) -> Worker:
        made = Worker(checkpoint(name))
        made.bind_cache()
        return made

    return start


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Triton launches, recorded instead of run; vLLM's opaque ops call what is behind them."""
    # Not above: vLLM's attention layers ask for the platform when they are imported.
    from vllm.model_executor.layers.attention import attention

    recorded: list[Launch] = []
    monkeypatch.setattr(Launch, "run", lambda launch: recorded.append(launch))
    monkeypatch.setattr(Launch, "spills", lambda launch: 0)  # fake tensors have no address
    for name in ("unified_kv_cache_update", "unified_attention_with_output"):
        # Under fake tensors, an op's fake implementation runs, and vLLM's does nothing.
        monkeypatch.setattr(torch.ops.vllm, name, getattr(attention, name))
    return recorded
