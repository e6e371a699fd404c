"""The checkpoint directory: written beside its place, then renamed into it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recalkv_vllm.checkpoint import (
    CONFIG_FILE,
    FACTORS_FILE,
    RecalkvConfig,
    factor_name,
    save_factors,
)
from recalkv_vllm.compression.architectures import Attention, CausalLM, compressed_architecture
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.factors import LayerFactors, reorder_rows

#: Files of the base model that are copied as they are.
COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template*", "generation_config.json",
)  # fmt: skip


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
    """A new directory beside ``out`` that becomes ``out`` if the block succeeds, else vanishes."""
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it private
        check_absent(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def install_factors(attention: Attention, factors: LayerFactors) -> None:
    """Put one layer's dense products and head order into the model.

    ``k_proj`` and ``v_proj`` become the products of the (rounded) factors in the factors' dtype.
    Query heads, output columns and all biases move with their KV heads.
    """
    dtype, order = factors.down.dtype, factors.layout.head_order
    for projection, product in zip(
        (attention.k_proj, attention.v_proj), factors.products(), strict=True
    ):
        projection.weight = nn.Parameter(product.to(dtype), requires_grad=False)
        if projection.bias is not None:
            projection.bias.data = reorder_rows(projection.bias.data, order)
    query = attention.q_proj
    query.weight.data = reorder_rows(query.weight.data, order)
    if query.bias is not None:
        query.bias.data = reorder_rows(query.bias.data, order)
    # o_proj's columns are heads; its bias is not per head.
    output = attention.o_proj
    output.weight.data = reorder_rows(output.weight.data.T, order).T.contiguous()


def write_checkpoint(
    directory: Path,
    source: Path,
    model: CausalLM,
    base_config: Mapping[str, Any],
    recalkv: RecalkvConfig,
    factors: list[LayerFactors],
) -> None:
    """Write all files but the model card.

    Args:
        directory: empty.
        source: the base model's directory.
        model: with factors installed, in the dtype to write.
        base_config: the base model's ``config.json``.
        recalkv: what to record.
        factors: rounded, one per layer.
    """
    model.save_pretrained(directory)
    for pattern in COPIED:
        for path in source.glob(pattern):
            shutil.copyfile(path, directory / path.name)
    config = {
        **base_config,
        "architectures": [compressed_architecture(base_config)],
        "recalkv": recalkv.to_dict(),
    }
    dtype_key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[dtype_key] = str(model.dtype).removeprefix("torch.")
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors: dict[str, torch.Tensor] = {}
    for layer, part in enumerate(factors):
        for short in ("down", "k_up", "v_up"):
            tensors[factor_name(layer, short)] = getattr(part, short)
    save_factors(directory / FACTORS_FILE, tensors)
