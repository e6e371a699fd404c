"""Registering with vLLM: cheap, repeatable, and alive in the processes that vLLM spawns."""

import pickle
import subprocess
import sys

from vllm.model_executor.models.registry import ModelRegistry
from vllm.v1.attention.backends.registry import AttentionBackendEnum

import recalkv_vllm
from recalkv_vllm.serving.attention.backend import RecalkvBackend
from recalkv_vllm.serving.names import ARCHITECTURES, BACKEND_NAME


def test_registering_twice_is_registering_once():
    recalkv_vllm.register()
    member = AttentionBackendEnum[BACKEND_NAME]
    recalkv_vllm.register()
    assert AttentionBackendEnum[BACKEND_NAME] is member
    assert member.get_class() is RecalkvBackend
    assert RecalkvBackend.get_name() == member.name
    assert set(ARCHITECTURES) <= set(ModelRegistry.get_supported_archs())


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
