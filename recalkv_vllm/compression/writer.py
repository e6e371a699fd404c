"""The checkpoint directory: written beside its place, then renamed into it."""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from recalkv_vllm.checkpoint import (
    CONFIG_FILE,
    FACTORS_FILE,
    RecalkvConfig,
    factor_name,
    file_sha256,
    save_factors,
)
from recalkv_vllm.compression.architectures import compressed_architecture
from recalkv_vllm.compression.errors import InputError, writing
from recalkv_vllm.compression.factors import LayerFactors, reorder_rows
from recalkv_vllm.compression.weights import Change, copy_weights

log = logging.getLogger(__name__)

#: Files of the base model that are copied as they are.
COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template*", "generation_config.json",
)  # fmt: skip
#: The same names in all supported families; ``qkv`` is Phi-3's.
ATTENTION_TENSOR = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.self_attn\.(?P<projection>q|k|v|o|qkv)_proj\.(?P<parameter>\w+)"
)


def check_absent(out: Path) -> None:
    """Raise :class:`InputError` if ``out`` exists or cannot be made."""
    if out.exists() or out.is_symlink():
        raise InputError(f"output {out}: exists already; expected a new path")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"output {out}: cannot be created in {parent}")


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A new directory beside ``out`` that becomes ``out`` if the block succeeds, else vanishes.

    Raises:
        OutputError: it cannot be written.
    """
    parent, prefix = out.absolute().parent, f".{out.name}."
    with writing(f"output {out}"):
        parent.mkdir(parents=True, exist_ok=True)
        # What a killed run leaves cannot be told from what another one is writing.
        for other in parent.glob(glob.escape(prefix) + "?" * 8):
            log.warning("%s: of a run that was killed, or is still writing", other)
        partial = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            yield partial
            partial.chmod(0o755)  # mkdtemp makes it private
            check_absent(out)
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def dense_form(factors: list[LayerFactors], dtype: torch.dtype, convert: bool) -> Change:
    """How base weights become those of a plain model that computes what is served.

    ``k_proj`` and ``v_proj`` become the products of the (rounded) factors, also where they were
    quantised. Query heads, output columns and all biases move with their KV heads; quantised ones
    cannot, and come with heads in natural order. Other tensors stay as they are.

    Args:
        factors: rounded, one per layer.
        dtype: of the products.
        convert: whether all other floating-point tensors become ``dtype`` too.
    """

    def change(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        if convert and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        found = ATTENTION_TENSOR.fullmatch(name)
        if found is None:
            yield name, tensor
            return
        layer = factors[int(found["layer"])]
        order = layer.layout.head_order
        match found["projection"], found["parameter"]:
            case "qkv", "weight":
                keys, values = (product.to(dtype) for product in layer.products())
                queries = reorder_rows(tensor[: -2 * len(keys)], order)
                yield name, torch.cat((queries, keys, values))
            case "k" | "v", "weight" | "weight_packed" | "qweight":
                keys, values = layer.products()
                name = f"{name.rpartition('.')[0]}.weight"
                yield name, (keys if found["projection"] == "k" else values).to(dtype)
            case ("q" | "k" | "v", "bias") | ("q", "weight"):
                yield name, reorder_rows(tensor, order)
            case "k" | "v", _:
                return  # scales and zero points of what is dense now
            case "o", "weight":
                if layer.output is not None:
                    tensor = layer.output
                # Columns are heads; o_proj's bias is not per head.
                yield name, reorder_rows(tensor.T, order).T
            case _:
                yield name, tensor

    return change


def write_checkpoint(
    directory: Path,
    source: Path,
    base_config: Mapping[str, Any],
    recalkv: RecalkvConfig,
    factors: list[LayerFactors],
    dtype: torch.dtype,
    convert: bool,
) -> None:
    """Write all files but the model card.

    Args:
        directory: empty.
        source: the base model's directory.
        base_config: the base model's ``config.json``.
        recalkv: what to record.
        factors: rounded, one per layer.
        dtype: of the written model.
        convert: see :func:`dense_form`.
    """
    copy_weights(source, directory, dense_form(factors, dtype, convert))
    write_factors(directory, {**base_config, **_dtype_entry(base_config, dtype)}, recalkv, factors)
    for pattern in COPIED:
        for path in source.glob(pattern):
            shutil.copyfile(path, directory / path.name)


def write_factors(
    directory: Path,
    base_config: Mapping[str, Any],
    recalkv: RecalkvConfig,
    factors: list[LayerFactors],
) -> None:
    """Write ``recalkv.safetensors``, and ``config.json`` with the ``recalkv`` object."""
    tensors: dict[str, torch.Tensor] = {}
    for layer, part in enumerate(factors):
        for short in ("down", "k_up", "v_up"):
            tensors[factor_name(layer, short)] = getattr(part, short)
    save_factors(directory / FACTORS_FILE, tensors)
    recorded = replace(recalkv, factors_sha256=file_sha256(directory / FACTORS_FILE))
    config = {
        **base_config,
        "architectures": [compressed_architecture(base_config)],
        "recalkv": recorded.to_dict(),
    }
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _dtype_entry(base_config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, str]:
    """The configuration's dtype, under the name that it has there."""
    key = "torch_dtype" if "torch_dtype" in base_config else "dtype"
    return {key: str(dtype).removeprefix("torch.")}
