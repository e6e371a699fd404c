"""KV connectors by name and by what they are told to do."""

import pytest

from recalkv_vllm.serving.startup.connectors import unsupported_connector


@pytest.mark.parametrize(
    ("name", "extra_config", "on_gpu"),
    [
        ("ExampleConnector", {}, False),
        ("OffloadingConnector", {"cpu_bytes_to_use": 1}, True),
        ("OffloadingConnector", {"spec_name": "Own", "spec_module_path": "own"}, False),
    ],
)
def test_accepted(name, extra_config, on_gpu):
    assert unsupported_connector(name, extra_config, on_gpu) is None


@pytest.mark.parametrize(
    ("name", "extra_config", "on_gpu", "message"),
    [
        ("SimpleCPUOffloadConnector", {}, True,
         "expected ExampleConnector or OffloadingConnector, found SimpleCPUOffloadConnector"),
        ("OffloadingConnector", {}, False, "OffloadingConnector: vLLM offloads from GPUs only, "
         "found a CPU"),
        ("OffloadingConnector", {"spec_name": "TieringOffloadingSpec"}, True,
         "spec_name: expected CPUOffloadingSpec, found TieringOffloadingSpec"),
        ("OffloadingConnector", {"canonical_layout": True}, True,
         "canonical_layout: expected false, found true"),
    ],
)  # fmt: skip
def test_refused(name, extra_config, on_gpu, message):
    assert unsupported_connector(name, extra_config, on_gpu) == message
