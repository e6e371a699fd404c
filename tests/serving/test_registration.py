"""Registering with vLLM: cheap, repeatable, and alive in the processes that vLLM spawns."""

import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.registry import ModelRegistry
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.registry import AttentionBackendEnum

import recalkv_vllm
from recalkv_vllm.serving.attention.backend import RecalkvBackend
from recalkv_vllm.serving.names import ARCHITECTURES, BACKEND_NAME
from recalkv_vllm.serving.vllm_version import TRIED

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_registering_twice_is_registering_once():
    recalkv_vllm.register()
    member = AttentionBackendEnum[BACKEND_NAME]
    recalkv_vllm.register()
    assert AttentionBackendEnum[BACKEND_NAME] is member
    assert member.get_class() is RecalkvBackend
    assert RecalkvBackend.get_name() == member.name
    assert set(ARCHITECTURES) <= set(ModelRegistry.get_supported_archs())


@pytest.mark.parametrize(
    ("version", "warnings"), [("0.34.1", 1), ("1.0.0rc1", 1), ("0.33.0+cpu", 0), ("dev", 0)]
)
def test_a_newer_vllm_than_tried_is_warned_of_once(version, warnings, monkeypatch, caplog):
    monkeypatch.setattr(vllm, "__version__", version)
    stand_in = type("EngineArgs", (EngineArgs,), {})
    monkeypatch.setattr("vllm.engine.arg_utils.EngineArgs", stand_in)
    monkeypatch.setattr(stand_in, "create_engine_config", lambda self: None)
    with caplog.at_level("WARNING", logger="recalkv_vllm"):
        recalkv_vllm.register()
        recalkv_vllm.register()
    found = [record.message for record in caplog.records if "is newer than" in record.message]
    assert len(found) == warnings
    assert all(f"vLLM {version} is newer" in line and "0.32 to 0.33" in line for line in found)


def test_packages_allow_the_releases_that_were_tried():
    (oldest, newest), text = (TRIED[0], TRIED[-1]), PYPROJECT.read_text(encoding="utf-8")
    allowed = re.findall(r'"vllm(?:-cpu)?>=(\d+)\.(\d+),<(\d+)\.(\d+)"', text)
    expected = tuple(str(n) for n in (*oldest, newest[0], newest[1] + 1))
    assert allowed == [expected, expected]


def test_backend_unpickles_in_a_process_that_has_not_loaded_plugins():
    recalkv_vllm.register()
    pickled = pickle.dumps(AttentionBackendEnum[BACKEND_NAME])
    code = (
        "import pickle, sys\n"
        "member = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "print(member.name, member.get_path())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, pickled.hex()], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [
        BACKEND_NAME,
        "recalkv_vllm.serving.attention.backend.RecalkvBackend",
    ]


def test_entry_point_imports_nothing_heavy():
    code = "import sys, recalkv_vllm; print(any(m in sys.modules for m in ('torch', 'vllm')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_engine_arguments_can_be_made_again_from_their_attributes():
    """As ``vllm bench throughput`` and ``vllm bench latency`` make them."""
    recalkv_vllm.register()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    made = EngineArgs.from_cli_args(parser.parse_args(["--model", "a-model"]))
    assert EngineArgs(**vars(made)).model == "a-model"
