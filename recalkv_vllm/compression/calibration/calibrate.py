"""The second stage of compression: calibration text, and statistics of a pass over it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from recalkv_vllm.cache_directory import cache_directory
from recalkv_vllm.compression.base_model.devices import calibration_dtype
from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.calibration.recall_text import draw_recall
from recalkv_vllm.compression.calibration.samples import (
    draw_samples,
    interleave,
    shares,
    token_ids,
)
from recalkv_vllm.compression.calibration.self_text import sample_self
from recalkv_vllm.compression.calibration.statistics import (
    Statistics,
    collect,
    samples_digest,
)
from recalkv_vllm.compression.calibration.text import RECALL, SELF, describe, documents
from recalkv_vllm.compression.check import Job
from recalkv_vllm.compression.options import CompressOptions


@dataclass(frozen=True, slots=True)
class Calibration:
    """Token ids ``[samples, seq_len]``, their statistics, and what to record of them."""

    samples: torch.Tensor
    statistics: Statistics
    provenance: dict[str, Any]


def calibrate(job: Job, samples: torch.Tensor) -> Calibration | None:
    """Collect the statistics that the method needs; None if it needs none.

    Args:
        job: as checked.
        samples: as :func:`draw` gives them.

    Raises:
        InputError: a model that overflows.
    """
    if not job.observers:
        return None
    model, options, device = job.model, job.options, job.device
    dtype = calibration_dtype(model.dtype, device)
    digest = samples_digest(samples)
    statistics = collect(
        job.observers,
        samples,
        model.geometry,
        key=_key(model, dtype, device, digest),
        load_model=lambda: model.load(dtype, device),
    )
    provenance = {
        "dataset": " + ".join(map(describe, options.datasets)),
        "samples": len(samples),
        "seq_len": options.seq_len,
        "seed": options.seed,
        "samples_digest": digest,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return Calibration(token_ids(samples), statistics, provenance)


def draw(
    model: BaseModel, options: CompressOptions, dtype: torch.dtype, device: str, num_samples: int
) -> torch.Tensor:
    """Draw calibration samples: from each of the options' datasets in turn.

    Args:
        model: whose tokenizer makes tokens of text, and who writes text of its own.
        options: datasets, ``seq_len`` and ``seed``.
        dtype: to write text in.
        device: to write text on.
        num_samples: more samples begin with the same ones.

    Returns:
        Token ids ``[samples, seq_len]``, int64, some of them perhaps left out of the loss
        (:func:`..samples.leave_out`); fewer samples than asked for where a dataset has too little
        text.

    Raises:
        InputError: no text, or no tokenizer.
    """
    tokenizer = model.tokenizer()
    sizes = dict(zip(options.datasets, shares(num_samples, len(options.datasets)), strict=True))
    drawn = {
        dataset: draw_samples(
            documents(dataset, options.text_column), tokenizer, size, options.seq_len, options.seed
        )
        for dataset, size in sizes.items()
        if dataset not in (SELF, RECALL)
    }
    if RECALL in sizes:
        drawn[RECALL] = draw_recall(tokenizer, sizes[RECALL], options.seq_len, options.seed)
    # Last, as it takes minutes: a file that is missing shows before.
    if SELF in sizes:
        drawn[SELF] = draw_self(model, dtype, device, sizes[SELF], options.seq_len, options.seed)
    return interleave([drawn[dataset] for dataset in options.datasets])


def draw_self(
    model: BaseModel, dtype: torch.dtype, device: str, num_samples: int, seq_len: int, seed: int
) -> torch.Tensor:
    """Samples ``[num_samples, seq_len]`` of text that the model writes, in ``dtype`` on ``device``,
    or has written before."""
    return sample_self(
        lambda: model.load(dtype, device),
        model.tokenizer(),
        num_samples,
        seq_len,
        seed,
        cache_directory() / "self-text" / _key(model, dtype, device),
    )


def _key(model: BaseModel, dtype: torch.dtype, device: str, samples: str = "") -> str:
    """Names what is made of a model with some arithmetic, and of samples by their digest."""
    identity = f"{model.digest()} {samples} {dtype} {device.split(':')[0]}"
    return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
