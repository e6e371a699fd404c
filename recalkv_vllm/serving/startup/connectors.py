"""Which of vLLM's KV connectors may move latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: They give the stock model's tokens in our tests.
TESTED_CONNECTORS = ("ExampleConnector", "OffloadingConnector")


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
    if name == "OffloadingConnector":
        spec = extra_config.get("spec_name", "CPUOffloadingSpec")
        if spec == "TieringOffloadingSpec":
            return "spec_name: expected CPUOffloadingSpec, found TieringOffloadingSpec"
        if spec == "CPUOffloadingSpec" and not on_gpu:
            return "OffloadingConnector: vLLM offloads from GPUs only, found a CPU"
        # It cuts pages by heads, so that they serve any tensor parallelism; latents are not so cut.
        if extra_config.get("canonical_layout"):
            return "canonical_layout: expected false, found true"
    return None
