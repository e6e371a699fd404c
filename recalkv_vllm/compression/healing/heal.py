"""The optional stage of compression between factors and checkpoint."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from recalkv_vllm.compression.base_model.attention import CausalLM
from recalkv_vllm.compression.base_model.devices import calibration_dtype
from recalkv_vllm.compression.calibration.calibrate import draw
from recalkv_vllm.compression.calibration.calibration_pass import freeze
from recalkv_vllm.compression.calibration.statistics import cache_directory, samples_digest
from recalkv_vllm.compression.check import Job
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.healing.state import StateFile
from recalkv_vllm.compression.healing.student import Student
from recalkv_vllm.compression.healing.training import train
from recalkv_vllm.compression.layer import LayerFactors
from recalkv_vllm.latent_format import LatentFormat

log = logging.getLogger(__name__)

#: Part of the state's file name: raise it when training changes.
HEALING_VERSION = 1
#: Samples that are held out, if there are four times as many.
HELD_OUT = 4


def draw_windows(job: Job, used: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples of the calibration text to train on, one a step if it has so many, and held out.

    Those held out are others than the factors were made from: on those, factors look better than
    they are, and training worse.

    Args:
        job: as checked.
        used: samples that factors were made from, if any.

    Raises:
        InputError: there is only one, or none that was not used.
    """
    options, dtype = job.options, calibration_dtype(job.model.dtype, job.device)
    known = set() if used is None else {tuple(sample) for sample in used.tolist()}
    wanted = len(known) + options.heal + HELD_OUT
    samples = draw(job.model, options, dtype, job.device, wanted)
    fresh = [i for i, sample in enumerate(samples.tolist()) if tuple(sample) not in known]
    if len(samples) < 2 or not fresh:
        raise InputError(
            "--heal: calibration text: expected 2 samples or more, one of them held out and not "
            f"used before, found {len(samples)} and {len(fresh)} not used; give more text, or a "
            "smaller --num-samples or --seq-len"
        )
    held_out = fresh[: max(1, min(HELD_OUT, len(samples) // 4))]
    rest = [i for i in (*fresh, *range(len(samples))) if i not in held_out]
    return samples[list(dict.fromkeys(rest))][: options.heal], samples[held_out]


def heal(
    job: Job,
    base: CausalLM,
    factors: Sequence[LayerFactors],
    latent_format: LatentFormat | None,
    used: torch.Tensor | None,
) -> tuple[list[LayerFactors], dict[str, Any]]:
    """Train factors by distillation from the dense model.

    Args:
        job: as checked.
        base: the base model in memory, ``o_proj`` refitted if it was; weights start from it.
        factors: of all layers.
        latent_format: how latents are stored.
        used: calibration samples ``[samples, seq_len]`` that factors were made from, if any.

    Returns:
        Factors in the dtype that they had, and what to record of the training.

    Raises:
        InputError: too little text to hold a part of it out.
    """
    options, model = job.options, job.model
    samples, held_out = draw_windows(job, used)
    dense = model.load(calibration_dtype(model.dtype, job.device), job.device)
    freeze(dense, gradient=True, seq_len=options.seq_len)
    student = Student(dense, base, factors, latent_format, job.weights_may_change)
    digest = samples_digest(samples)
    told = (
        *(model.digest(), digest, _digest(factors), latent_format, dense.dtype),
        *(options.heal, options.seed, job.weights_may_change, job.device.split(":")[0]),
    )
    name = hashlib.blake2b(repr(told).encode(), digest_size=16).hexdigest()
    state_file = StateFile(cache_directory() / f"healing-{HEALING_VERSION}" / f"{name}.safetensors")
    log.info(
        "healing: %d steps of %d tokens, %d samples to train on and %d held out",
        options.heal, options.seq_len, len(samples), len(held_out),
    )  # fmt: skip
    healed = train(student, samples, held_out, options.heal, options.seed, state_file)
    record = asdict(healed) | {
        "weights": job.weights_may_change,
        "samples": len(samples),
        "samples_digest": digest,
    }
    return student.rounded(factors), record


def _digest(factors: Sequence[LayerFactors]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for layer in factors:
        for part in (layer.down, layer.k_up, layer.v_up):
            digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
