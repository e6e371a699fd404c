"""The offline tool on a GPU, as far as a CPU can tell: every tensor where it is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from recalkv_vllm.compression.base_model import devices
from recalkv_vllm.compression.factoring import output_refit
from recalkv_vllm.compression.healing import student
from recalkv_vllm.compression.options import CompressOptions
from recalkv_vllm.compression.pipeline import compress
from recalkv_vllm.evaluation import transformers_engine
from tests.pretend_device import NAME, PretendDevice

FEW = {"num_samples": 4, "seq_len": 32, "target": "none"}
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


def test_the_device_tells_tensors_apart() -> None:
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


@pytest.fixture(scope="module")
def model(make_model) -> Path:
    """In float32: the device has no autocast."""
    return make_model("llama", torch.float32)


@pytest.mark.parametrize("name", JOBS)
def test_compress_and_evaluate(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"compression": 0.5, **FEW, **BUILTIN, **JOBS[name]}
    for module in (devices, transformers_engine):
        monkeypatch.setattr(module, "choose_device", lambda device: NAME)
    with PretendDevice():
        compress(CompressOptions(str(model), tmp_path / "out", device=NAME, **options))
        ((loss, _),) = transformers_engine.score_windows(tmp_path / "out", [list(range(40))])
        served = transformers_engine.load_served(tmp_path / "out")
    assert served.device == torch.device(NAME, 0)
    monkeypatch.undo()
    ((expected, _),) = transformers_engine.score_windows(tmp_path / "out", [list(range(40))])
    assert loss == pytest.approx(expected, rel=1e-4)


def left_in_memory(value: Any, device: str) -> Any:
    return value


@pytest.mark.parametrize(
    ("name", "place", "mistake"),
    [
        ("kfac-refit", (output_refit, "_to_device"), left_in_memory),
        ("kfac-healed", (student, "execution_device"), lambda module: torch.device("cpu")),
    ],
)
def test_a_tensor_left_in_memory_is_found(
    name: str,
    place: tuple[ModuleType, str],
    mistake: Callable[..., object],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"compression": 0.5, **FEW, **BUILTIN, **JOBS[name]}
    monkeypatch.setattr(*place, mistake)
    with PretendDevice(), pytest.raises(RuntimeError, match="expected all tensors on one device"):
        compress(CompressOptions(str(model), tmp_path / "out", device=NAME, **options))
