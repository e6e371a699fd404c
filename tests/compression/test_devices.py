"""The offline tool on a GPU, as far as a CPU can tell: every tensor where it is needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch

from recalkv_vllm.compression.factoring import output_refit
from recalkv_vllm.compression.healing import student
from recalkv_vllm.compression.options import CompressOptions
from recalkv_vllm.compression.pipeline import compress
from recalkv_vllm.evaluation import transformers_engine
from tests.pretend_device import NAME, PretendDevice

FEW = {"num_samples": 4, "seq_len": 32, "target": "none"}
TOKENS = list(range(40))
BUILTIN = {"datasets": ("builtin",)}
JOBS: dict[str, dict[str, Any]] = {
    "kfac": {},
    "kfac-refit": {"latent_dtype": "bf16", "output_refit": True},
    "kfac-bands-refit": {"compression": 0.85, "output_refit": True},
    "kfac-split": {"spans": "split", "k_group_size": 2},
    "kfac-int4": {"compression": 0.8, "latent_dtype": "int4"},
    "kfac-healed": {"compression": 0.8, "heal": 2},
    "kfac-budget": {"compression": None, "max_loss": 0.5},
    "recalkv": {"method": "recalkv"},
    "recalkv-healed": {"method": "recalkv", "heal": 2},
    "palu": {"method": "palu"},
    "svd-int8": {"method": "svd", "latent_dtype": "int8"},
    "self": {"datasets": ("self",)},
}


def tell_tensors_apart() -> None:
    with PretendDevice():
        there = torch.ones(3, device=NAME)
        assert (there + torch.tensor(1.0)).sum().item() == 6
        assert there[torch.tensor([0, 2])].shape == (2,)
        there[1:] = 5
        there += 1
        assert there.cpu().tolist() == [2, 6, 6]
        layer = torch.nn.Linear(3, 2).to(NAME)
        layer(there).sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.device.type == NAME
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()


def compress_there(model: Path, out: Path, name: str, mistake: str | None = None) -> None:
    options = {"compression": 0.5, **FEW, **BUILTIN, **JOBS[name]}
    with patch.dict(os.environ, RECALKV_CACHE=str(out.parent / "cache")), ExitStack() as planted:
        if mistake is not None:
            planted.enter_context(patch.object(*MISTAKES[mistake]))
        with PretendDevice():
            compress(CompressOptions(str(model), out, device=NAME, **options))


def score_there(checkpoint: Path) -> float:
    with (
        patch.object(transformers_engine, "choose_device", lambda device: NAME),
        PretendDevice(),
    ):
        served = transformers_engine.load_served(checkpoint)
        assert served.device == torch.device(NAME, 0)
        loss = sum(*transformers_engine.score_windows(checkpoint, [TOKENS]))
    return loss


#: Where a tensor stays in memory, and what takes the place of what moves it.
MISTAKES: dict[str, tuple[ModuleType, str, Callable[..., object]]] = {
    "kfac-refit": (output_refit, "_to_device", lambda value, device: value),
    "kfac-healed": (student, "execution_device", lambda module: torch.device("cpu")),
}


@pytest.fixture(scope="module")
def in_fresh_process() -> Iterator[Callable[..., Any]]:
    """``in_fresh_process(function, *args)``: autograd serves only devices that its process knew
    before its first backward pass."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Path:
    """In float32: the device has no autocast."""
    return make_model("llama", torch.float32)


def test_the_device_tells_tensors_apart(in_fresh_process: Callable[..., Any]) -> None:
    in_fresh_process(tell_tensors_apart)


@pytest.mark.parametrize("name", JOBS)
def test_compress_and_evaluate(
    name: str, model: Path, tmp_path: Path, in_fresh_process: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    in_fresh_process(compress_there, model, out, name)
    loss = in_fresh_process(score_there, out)
    expected = sum(*transformers_engine.score_windows(out, [TOKENS]))
    assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_tensor_left_in_memory_is_found(
    name: str, model: Path, tmp_path: Path, in_fresh_process: Callable[..., Any]
) -> None:
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        in_fresh_process(compress_there, model, tmp_path / "out", name, name)
