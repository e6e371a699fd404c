"""What cannot be served is refused before any process starts, in one line that names it."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.engine.arg_utils import EngineArgs

from recalkv_vllm.checkpoint import FACTORS_FILE
from recalkv_vllm.serving.startup.errors import ServingError
from tests.e2e.conftest import BIN

RECALKV = {"attention_backend": "recalkv"}


@pytest.fixture
def broken(half, tmp_path) -> Path:
    """A copy of a good checkpoint to break; the large weights are linked."""
    copy = tmp_path / "broken"
    shutil.copytree(half, copy, copy_function=lambda a, b: Path(b).symlink_to(a))
    for name in ("config.json", FACTORS_FILE):
        (copy / name).unlink()
        shutil.copy(half / name, copy / name)
    return copy


def refusal(model, **arguments):
    """The message that creating an engine configuration ends with."""
    arguments = {**RECALKV, "enforce_eager": True, "dtype": "float32", **arguments}
    with pytest.raises(ServingError) as caught:
        EngineArgs(model=str(model), **arguments).create_engine_config()
    assert caught.value.code not in (0, None)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_stock_model_under_our_flag_ends_vllm_serve_with_one_line(model):
    done = subprocess.run(
        [BIN / "vllm", "serve", model, "--attention-backend", "recalkv"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "LlamaForCausalLM without factors" in last
    assert f"recalkv compress {model} -o OUT --compression 0.5" in last


def test_good_checkpoint_passes_with_and_without_the_flag(half):
    for backend in ("recalkv", None):
        EngineArgs(
            model=str(half), enforce_eager=True, dtype="float32", attention_backend=backend
        ).create_engine_config()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"kv_cache_dtype": "fp8_e5m2"},
            ["--kv-cache-dtype", "expected auto or float32 or fp8 or fp8_e4m3", "found fp8_e5m2"],
        ),
        ({"attention_backend": "CPU_ATTN"}, ["--attention-backend", "recalkv", "found CPU_ATTN"]),
        (
            {"kv_transfer_config": {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}},
            ["--kv-transfer-config", "ExampleConnector", "found LMCacheConnectorV1"],
        ),
        (
            {"kv_offloading_size": 1.0},
            ["--kv-transfer-config", "OffloadingConnector: vLLM offloads from GPUs only"],
        ),
    ],
)
def test_unsupported_option(half, arguments, words):
    message = refusal(half, **arguments)
    assert all(word in message for word in words), message


def test_truncated_factors(broken):
    path = broken / FACTORS_FILE
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path}: not a readable safetensors file" in refusal(broken)


def test_missing_factors(broken):
    (broken / FACTORS_FILE).rename(broken / "factors.safetensors")
    assert f"{broken / FACTORS_FILE}: no such file" in refusal(broken)


def test_poisoned_factors(broken):
    tensors = load_file(broken / FACTORS_FILE)
    tensors["layers.7.k_up"].view(-1)[5] = torch.nan
    save_file(tensors, broken / FACTORS_FILE)
    message = refusal(broken)
    assert "layers.7.k_up: expected finite values, found 1 of" in message


def test_factors_of_another_model(broken):
    tensors = load_file(broken / FACTORS_FILE)
    tensors["layers.0.down"] = tensors["layers.0.down"][:, :-16].clone()
    save_file(tensors, broken / FACTORS_FILE)
    assert "layers.0.down: expected shape" in refusal(broken)


def test_newer_format(broken):
    config = json.loads((broken / "config.json").read_text())
    config["recalkv"]["format_version"] = 99
    (broken / "config.json").write_text(json.dumps(config))
    assert "format_version: expected 1 or 2, found 99" in refusal(broken)
