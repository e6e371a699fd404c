"""The second stage of compression: calibration text, and statistics of a pass over it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from recalkv_vllm.compression.base_model.devices import calibration_dtype
from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.calibration.samples import draw_samples
from recalkv_vllm.compression.calibration.self_text import SELF, sample_self
from recalkv_vllm.compression.calibration.statistics import Statistics, collect, samples_digest
from recalkv_vllm.compression.calibration.text import describe, documents
from recalkv_vllm.compression.check import Job
from recalkv_vllm.compression.options import CompressOptions


@dataclass(frozen=True, slots=True)
class Calibration:
    """Samples ``[samples, seq_len]``, their statistics, and what to record of them."""

    samples: torch.Tensor
    statistics: Statistics
    provenance: dict[str, Any]


def calibrate(job: Job, samples: torch.Tensor) -> Calibration | None:
    """Collect the statistics that the method needs; None if it needs none.

    Args:
        job: as checked.
        samples: ``[samples, seq_len]`` token ids.

    Raises:
        InputError: a model that overflows.
    """
    if not job.observers:
        return None
    model, options, device = job.model, job.options, job.device
    dtype = calibration_dtype(model.dtype, device)
    digest = samples_digest(samples)
    identity = f"{model.digest()} {digest} {dtype} {device.split(':')[0]}"
    statistics = collect(
        job.observers,
        samples,
        model.geometry,
        key=hashlib.blake2b(identity.encode(), digest_size=16).hexdigest(),
        load_model=lambda: model.load(dtype, device),
    )
    provenance = {
        "dataset": describe(options.dataset),
        "samples": len(samples),
        "seq_len": options.seq_len,
        "seed": options.seed,
        "samples_digest": digest,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return Calibration(samples, statistics, provenance)


def draw(
    model: BaseModel, options: CompressOptions, dtype: torch.dtype, device: str, num_samples: int
) -> torch.Tensor:
    """Samples ``[num_samples, seq_len]`` of the calibration text, or as many as it has.

    Raises:
        InputError: no text of that length, or no tokenizer.
    """
    tokenizer = model.tokenizer()
    size = (num_samples, options.seq_len, options.seed)
    if options.dataset == SELF:
        return sample_self(model.load(dtype, device), tokenizer, *size)
    return draw_samples(documents(options.dataset, options.text_column), tokenizer, *size)
