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
from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.calibration.calibration_pass import freeze
from recalkv_vllm.compression.calibration.statistics import cache_directory, samples_digest
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.healing.state import StateFile
from recalkv_vllm.compression.healing.student import Student
from recalkv_vllm.compression.healing.training import train
from recalkv_vllm.compression.layer import LayerFactors
from recalkv_vllm.latent_format import LatentFormat

log = logging.getLogger(__name__)

#: Part of the state's file name: raise it when training changes.
HEALING_VERSION = 1
#: One in so many samples is held out, at least one.
HELD_OUT = 16


def split_samples(samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples to train on, and samples held out.

    Raises:
        InputError: there is only one.
    """
    if len(samples) < 2:
        raise InputError(
            "--heal: calibration text: expected 2 samples or more, one of them held out, found "
            f"{len(samples)}; give more text or a smaller --seq-len"
        )
    held_out = max(1, len(samples) // HELD_OUT)
    return samples[:-held_out], samples[-held_out:]


def heal(
    model: BaseModel,
    base: CausalLM,
    factors: Sequence[LayerFactors],
    latent_format: LatentFormat | None,
    samples: torch.Tensor,
    *,
    steps: int,
    seed: int,
    device: str,
    train_weights: bool,
) -> tuple[list[LayerFactors], dict[str, Any]]:
    """Train factors by distillation from the dense model.

    Args:
        model: the dense model.
        base: the same in memory, ``o_proj`` refitted if it was; training starts from its weights.
        factors: of all layers.
        latent_format: how latents are stored.
        samples: ``[samples, seq_len]`` token ids of the calibration text.
        steps: of one sample each.
        seed: of the order of samples.
        device: where to train.
        train_weights: whether ``q_proj`` and ``o_proj`` may change too.

    Returns:
        Factors in the dtype that they had, and what to record of the training.

    Raises:
        InputError: no sample can be held out.
    """
    training, held_out = split_samples(samples)
    dtype = calibration_dtype(model.dtype, device)
    dense = model.load(dtype, device)
    freeze(dense, gradient=True, seq_len=samples.shape[1])
    student = Student(dense, base, factors, latent_format, train_weights)
    told = (model.digest(), samples_digest(samples), _digest(factors), latent_format, steps, seed,
            train_weights, dtype, device.split(":")[0])  # fmt: skip
    name = hashlib.blake2b(repr(told).encode(), digest_size=16).hexdigest()
    directory = cache_directory() / f"healing-{HEALING_VERSION}"
    log.info(
        "healing: %d steps of %d tokens, %d samples to train on and %d held out",
        steps, samples.shape[1], len(training), len(held_out),
    )  # fmt: skip
    state_file = StateFile(directory / f"{name}.safetensors")
    healed = train(student, training, held_out, steps, seed, state_file)
    return student.rounded(factors), asdict(healed) | {"weights": train_weights}


def _digest(factors: Sequence[LayerFactors]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for layer in factors:
        for part in (layer.down, layer.k_up, layer.v_up):
            digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
