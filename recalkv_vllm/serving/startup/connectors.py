"""Which of vLLM's KV connectors may move latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: They give the stock model's tokens in our tests.
TESTED_CONNECTORS = ("ExampleConnector", "OffloadingConnector", "MultiConnector")


def unsupported_connector(
    name: str | None, extra_config: Mapping[str, Any], on_gpu: bool
) -> str | None:
    """What is wrong with a connector; None if nothing is.

    Args:
        name: ``kv_connector`` of ``--kv-transfer-config``.
        extra_config: its ``kv_connector_extra_config``.
        on_gpu: whether the cache is on a GPU.
    """
    if name not in TESTED_CONNECTORS:
        return f"expected {' or '.join(TESTED_CONNECTORS)}, found {name}"
    if name == "MultiConnector":
        # vLLM says what else is wrong with its list.
        for each in extra_config.get("connectors", ()):
            config = each.get("kv_connector_extra_config") or {}
            if wrong := unsupported_connector(each.get("kv_connector"), config, on_gpu):
                return f"MultiConnector: {wrong}"
    if name == "OffloadingConnector":
        spec = extra_config.get("spec_name", "CPUOffloadingSpec")
        if spec == "TieringOffloadingSpec":
            return "spec_name: expected CPUOffloadingSpec, found TieringOffloadingSpec"
        if spec == "CPUOffloadingSpec" and not on_gpu:
            return "OffloadingConnector: vLLM offloads from GPUs only, found a CPU"
    return None
