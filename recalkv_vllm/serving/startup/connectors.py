"""Which of vLLM's KV connectors may move latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: They give the stock model's tokens in our tests.
TESTED_CONNECTORS = (
    *("ExampleConnector", "ExampleHiddenStatesConnector", "OffloadingConnector"),
    *("NixlConnector", "MultiConnector"),
)


def unsupported_connector(
    name: str | None, extra_config: Mapping[str, Any], on_gpu: bool, ranks: int
) -> str | None:
    """What is wrong with a connector; None if nothing is.

    Args:
        name: ``kv_connector`` of ``--kv-transfer-config``.
        extra_config: its ``kv_connector_extra_config``.
        on_gpu: whether the cache is on a GPU.
        ranks: among which the engine's tensor and pipeline parallelism divides the model.
    """
    if name not in TESTED_CONNECTORS:
        return f"expected {' or '.join(TESTED_CONNECTORS)}, found {name}"
    if name == "MultiConnector":
        # vLLM says what else is wrong with its list.
        for each in extra_config.get("connectors", ()):
            config = each.get("kv_connector_extra_config") or {}
            if wrong := unsupported_connector(each.get("kv_connector"), config, on_gpu, ranks):
                return f"MultiConnector: {wrong}"
    if name == "NixlConnector" and ranks > 1:
        # Between engines of different sizes it cuts pages as if the model's KV heads lay in them.
        return f"NixlConnector: expected an engine of one rank, found {ranks}"
    if name == "OffloadingConnector":
        spec = extra_config.get("spec_name", "CPUOffloadingSpec")
        if spec == "TieringOffloadingSpec":
            return f"spec_name: expected CPUOffloadingSpec or ColdTierSpec, found {spec}"
        if spec == "ColdTierSpec" and "root_dir" not in extra_config:
            return "ColdTierSpec: expected root_dir, the folder of its files, found none"
        if spec == "CPUOffloadingSpec" and not on_gpu:
            return "OffloadingConnector: vLLM offloads from GPUs only, found a CPU"
    return None
