"""What ``recalkv explore`` says of each way to compress a model."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from recalkv_vllm.checkpoint import RecalkvConfig
from recalkv_vllm.cli.compress_command import compress_command
from recalkv_vllm.cli.memory import check_countable, compressed_weight_bytes, kv_cache_bytes
from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.check import Job
from recalkv_vllm.compression.explore import Explored
from recalkv_vllm.serving import capacity


def row_of(options: argparse.Namespace, explored: Explored) -> dict[str, Any]:
    """The JSON object of a way to compress.

    ``removed`` is the fraction of a 16-bit cache that is reached, ``compression`` what to ask for;
    ``bits`` are those per number of a latent, scales and padding included, ``bands`` columns over
    all layers by bits (None of other formats); ``expected_loss`` is in nats per token. ``tokens``
    is None without a memory, ``relative_decode_time`` without a device.

    Raises:
        InputError: not enough memory for the weights.
    """
    job, plan = explored.job, explored.plan
    geometry = job.model.geometry
    stored = plan.token_bytes(2, geometry.key_scales())
    bands = Counter[int]()
    for layout in plan.layouts:
        for band in layout.bands or ():
            bands[band.bits] += band.columns
    return {
        "removed": 1 - stored / (2 * geometry.dense_width * len(plan.layouts)),
        "compression": job.compression,
        "latent_dtype": job.options.latent_dtype,
        "bits": 8 * stored / sum(layout.rank for layout in plan.layouts),
        "bands": {str(bits): bands[bits] for bits in sorted(bands)} or None,
        "group_size": plan.k_group_size,
        "expected_loss": plan.expected_loss,
        "relative_decode_time": explored.decode_time,
        **cache_of(options, job.model, explored),
        "front": explored.on_front,
        "command": compress_command(replace(job.options, out=Path(_out(job)))),
    }


def _out(job: Job) -> str:
    """A name for the checkpoint that tells it from the others."""
    name, options = job.model.name.rpartition("/")[2], job.options
    return f"{name}-{job.compression:g}-{options.latent_dtype}-{options.k_group_size}"


def cache_of(
    options: argparse.Namespace, model: BaseModel, explored: Explored | None = None
) -> dict[str, int | None]:
    """Bytes per token in the model's dtype, and the tokens that fit if there is a memory; of the
    dense cache if nothing was explored.

    Raises:
        InputError: not enough memory for the weights.
    """
    geometry, itemsize = model.geometry, model.dtype.itemsize
    if explored is None:
        per_token = capacity.dense_bytes_per_token(geometry, itemsize, 1)
    else:
        scales = geometry.key_scales()
        per_token = explored.plan.token_bytes(itemsize, scales)
    if options.memory is None and options.kv_cache_memory_bytes is None:
        return {"bytes_per_token": per_token, "tokens": None}
    check_countable(geometry, options.model)
    weights = capacity.weight_bytes(model.directory, model.config, itemsize)
    if explored is not None:
        plan = explored.plan
        config = RecalkvConfig(
            "kfac", explored.job.compression, plan.layouts, latent_quantization=plan.uniform_format
        )
        weights = compressed_weight_bytes(weights, config, geometry, itemsize, 1)
    cache_bytes = kv_cache_bytes(options, weights, 1)
    found = capacity.capacity(per_token, cache_bytes, options.block_size, 1)
    return {"bytes_per_token": per_token, "tokens": found.kv_cache_tokens}
