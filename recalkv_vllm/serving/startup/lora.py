"""LoRA adapters on a compressed model: refused where they would change what is not there."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from vllm.config import VllmConfig

from recalkv_vllm.checkpoint import AttentionGeometry, LatentLayout, RecalkvConfig

ADAPTER_FILE = "adapter_model.safetensors"
_ADAPTED = re.compile(r"layers\.(\d+)\.self_attn\.(q|k|v|o|qkv)_proj\.")


def check_adapter(path: str, layers: Mapping[int, LatentLayout]) -> None:
    """Raise ``ValueError`` if the adapter in directory ``path`` cannot act on these layers.

    Keys and values have no projection of their own any more. Queries and outputs have theirs, but
    an adapter of the base model means the base model's order of heads.
    """
    file = Path(path) / ADAPTER_FILE
    if not file.is_file():
        return  # vLLM finds it, or says that there is none
    with safe_open(file, framework="pt") as tensors:
        names = sorted(tensors.keys())
    for name in names:
        found = _ADAPTED.search(name)
        if found is None:
            continue
        layer, projection = int(found[1]), found[2]
        if layer not in layers:
            continue  # vLLM says what it thinks of it
        if projection in ("k", "v", "qkv"):
            raise ValueError(
                f"LoRA adapter {path}: {projection}_proj of layer {layer}: keys and values are "
                "compressed; expected an adapter on other modules"
            )
        order = layers[layer].head_order
        if list(order) != sorted(order):
            raise ValueError(
                f"LoRA adapter {path}: {projection}_proj of layer {layer}: expected heads in their "
                f"natural order, found {list(order)}; compress with --k-group-size 1"
            )


def check_adapters_of_requests() -> None:
    """Make a request with an unservable adapter fail alone, before it reaches the engine.

    Wraps a method because in vLLM 0.32 an adapter that does not load ends the engine process. Can
    go when it fails the request instead.
    """
    # Not above: it loads much that only an engine's front end needs.
    from vllm.v1.engine import input_processor

    processor: Any = input_processor.InputProcessor
    validate = processor._validate_lora
    if getattr(validate, "checked_by_recalkv", False):
        return

    @functools.wraps(validate)
    def _validate_lora(self, lora_request) -> None:
        validate(self, lora_request)
        if lora_request is not None and (layers := served_layers(self.vllm_config)):
            check_adapter(lora_request.lora_path, layers)

    processor._validate_lora = _validate_lora
    processor._validate_lora.checked_by_recalkv = True


def served_layers(config: VllmConfig) -> Mapping[int, LatentLayout]:
    """Layouts of a compressed model, by layer of its decoder; none for others."""
    hf_config = config.model_config.hf_config
    if not getattr(hf_config, "recalkv", None):
        return {}
    raw = hf_config.to_dict()
    indices = AttentionGeometry.from_hf_config(raw).layer_indices
    return dict(zip(indices, RecalkvConfig.from_hf_config(raw).layers, strict=True))
