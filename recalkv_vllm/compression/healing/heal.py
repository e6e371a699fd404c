"""The optional stage of compression between factors and checkpoint."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from recalkv_vllm.band_format import CacheFormat
from recalkv_vllm.cache_directory import cache_directory
from recalkv_vllm.compression.base_model.attention import CausalLM
from recalkv_vllm.compression.base_model.devices import calibration_dtype
from recalkv_vllm.compression.calibration.calibration_pass import freeze
from recalkv_vllm.compression.calibration.calibration_text import CalibrationText
from recalkv_vllm.compression.calibration.statistics import samples_digest
from recalkv_vllm.compression.check import Job
from recalkv_vllm.compression.healing.state import StateFile
from recalkv_vllm.compression.healing.student import Student
from recalkv_vllm.compression.healing.training import train
from recalkv_vllm.compression.layer import LayerFactors

log = logging.getLogger(__name__)

#: Part of the state's file name: raise it when training changes.
HEALING_VERSION = 2


def heal(
    job: Job,
    base: CausalLM,
    factors: Sequence[LayerFactors],
    latent_formats: Sequence[CacheFormat | None],
    text: CalibrationText,
) -> tuple[list[LayerFactors], dict[str, Any]]:
    """Train factors by distillation from the dense model.

    Args:
        job: as checked.
        base: the base model in memory.
        factors: of all layers; weights start from the base model's where theirs are not refitted.
        latent_formats: how each layer's latents are stored; None for plain elements.
        text: with samples to train on and held out.

    Returns:
        Factors in the dtype that they had, and what to record of the training.

    Raises:
        InputError: predictions that are not finite before any training.
    """
    options, model = job.options, job.model
    dense = model.load(calibration_dtype(model.dtype, job.device), job.device)
    freeze(dense, gradient=True, seq_len=options.seq_len)
    student = Student(dense, base, factors, latent_formats, job.weights_may_change)
    digests = [samples_digest(samples) for samples in (text.training, text.held_out)]
    told = (
        *(model.digest(), *digests, _digest(factors), list(latent_formats), dense.dtype),
        *(options.heal, options.seed, job.weights_may_change, job.device.split(":")[0]),
    )
    name = hashlib.blake2b(repr(told).encode(), digest_size=16).hexdigest()
    state_file = StateFile(cache_directory() / f"healing-{HEALING_VERSION}" / f"{name}.safetensors")
    log.info(
        "healing: %d steps of %d tokens, %d samples to train on and %d held out",
        options.heal, options.seq_len, len(text.training), len(text.held_out),
    )  # fmt: skip
    healed = train(student, text.training, text.held_out, options.heal, options.seed, state_file)
    record = asdict(healed) | {
        "weights": job.weights_may_change,
        "samples": len(text.training),
        "samples_digest": digests[0],
    }
    return student.rounded(factors), record


def _digest(factors: Sequence[LayerFactors]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for layer in factors:
        for part in (layer.down, layer.k_up, layer.v_up, layer.output):
            if part is not None:
                digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
