"""The files of a compressed checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from recalkv_vllm.base_digest import DIGEST_KEY
from recalkv_vllm.checkpoint import (
    CONFIG_FILE,
    FACTORS_FILE,
    RecalkvConfig,
    factor_name,
    file_sha256,
    save_factors,
)
from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.layer import LayerFactors
from recalkv_vllm.compression.output.copy_weights import copy_weights
from recalkv_vllm.compression.output.dense_form import dense_form

#: Files of the base model that are copied as they are.
COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template*", "generation_config.json", "*processor_config.json",
)  # fmt: skip


def write_checkpoint(
    directory: Path,
    model: BaseModel,
    recalkv: RecalkvConfig,
    factors: Sequence[LayerFactors],
    dtype: torch.dtype,
    convert: bool,
) -> None:
    """Write a whole model: all files but the model card.

    Args:
        directory: empty.
        model: the base model.
        recalkv: what to record.
        factors: rounded, one per layer.
        dtype: of the written model.
        convert: see :func:`dense_form`.
    """
    copy_weights(
        model.directory,
        directory,
        dense_form(factors, dtype, convert, model.geometry.layer_indices),
    )
    # The configuration's dtype stays under the name that it has there.
    dtype_key = "torch_dtype" if "torch_dtype" in model.config else "dtype"
    changes: dict[str, Any] = {dtype_key: str(dtype).removeprefix("torch.")}
    if model.weight_format is not None:
        changes["quantization_config"] = model.weight_format.with_dense_kv(model.tensor_shapes())
    _write_factors(directory, model, changes, recalkv, factors)
    for pattern in COPIED:
        for path in model.directory.glob(pattern):
            shutil.copyfile(path, directory / path.name)


def write_factors_only(
    directory: Path, model: BaseModel, recalkv: RecalkvConfig, factors: Sequence[LayerFactors]
) -> None:
    """Write factors to be served on the untouched base model, which a digest tells."""
    _write_factors(directory, model, {DIGEST_KEY: model.key_value_digest()}, recalkv, factors)


def _write_factors(
    directory: Path,
    model: BaseModel,
    changes: Mapping[str, Any],
    recalkv: RecalkvConfig,
    factors: Sequence[LayerFactors],
) -> None:
    """Write ``recalkv.safetensors``, and ``config.json`` with the ``recalkv`` object."""
    tensors: dict[str, torch.Tensor] = {}
    for layer, part in enumerate(factors):
        for short in ("down", "k_up", "v_up"):
            tensors[factor_name(layer, short)] = getattr(part, short)
    save_factors(directory / FACTORS_FILE, tensors)
    recorded = replace(recalkv, factors_sha256=file_sha256(directory / FACTORS_FILE))
    config = {
        **model.config,
        **changes,
        "architectures": [model.architecture.served_name],
        "recalkv": recorded.to_dict(),
    }
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
