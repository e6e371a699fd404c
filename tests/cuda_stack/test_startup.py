"""Start-up in vLLM's CUDA build: the plugin, the platform, and the real configuration."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

import recalkv_vllm
from recalkv_vllm.ops.cuda import extension
from recalkv_vllm.serving.names import BACKEND_NAME
from tests.cuda_stack.checkpoints import EVERY

CONFIGURE = """
import sys
from vllm.engine.arg_utils import EngineArgs
config = EngineArgs(model=sys.argv[1], max_model_len=512).create_engine_config()
print(config.parallel_config.worker_cls, config.use_v2_model_runner)
print(*config.compilation_config.cudagraph_capture_sizes)
"""


def test_platform() -> None:
    assert current_platform.get_device_capability().to_int() == 90
    assert "H100" in current_platform.get_device_name()
    assert current_platform.get_device_total_memory() == 80 << 30


def test_an_engine_is_configured_in_a_process_of_its_own(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM inspects the class in one more process, whose result it would keep."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", CONFIGURE, checkpoint("plain")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    runner, sizes = done.stdout.splitlines()[-2:]
    assert runner == "vllm.v1.worker.gpu_worker.Worker True"
    assert sizes.split()[:3] == ["1", "2", "4"]


@pytest.mark.parametrize("name", EVERY)
def test_checkpoints_are_accepted(name: str, checkpoint: Callable[[str], Path]) -> None:
    config = EngineArgs(
        model=str(checkpoint(name)), max_model_len=512, attention_backend="recalkv"
    ).create_engine_config()
    assert config.attention_config.backend.name == BACKEND_NAME
    assert config.use_v2_model_runner


def test_the_selector_refuses_stock_layers() -> None:
    recalkv_vllm.register()
    layer = AttentionSelectorConfig(head_size=64, dtype=None, kv_cache_dtype="auto", block_size=16)
    with pytest.raises(ValueError, match="no low-rank factors; compress it first"):
        current_platform.get_attn_backend_cls(AttentionBackendEnum[BACKEND_NAME], layer)


def test_the_extension_is_loaded() -> None:
    assert extension.load_error is None
