"""Calibration text cut into samples, all of them before any work."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recalkv_vllm.compression.base_model.devices import calibration_dtype
from recalkv_vllm.compression.calibration.samples import cut_samples, draw_samples
from recalkv_vllm.compression.calibration.self_text import SELF, sample_self
from recalkv_vllm.compression.calibration.text import documents
from recalkv_vllm.compression.check import Job
from recalkv_vllm.compression.errors import InputError

#: Samples that are held out for healing, and for a budget of loss, if there are four times as many.
HELD_OUT = 4
HELD_OUT_FOR_BUDGET = 16


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """Samples ``[samples, seq_len]``, by what is done with them; there may be none.

    Args:
        factoring: that statistics and the output refit see.
        training: to heal on, one a step if the text has so many.
        held_out: to measure losses on; none of the others.
    """

    factoring: torch.Tensor
    training: torch.Tensor
    held_out: torch.Tensor


def draw_text(job: Job) -> CalibrationText:
    """Draw the samples that a compression needs.

    Those to heal on are ones that factoring does not see, as far as there are enough: on what it
    has seen, factors look better than they are, and training teaches less.

    Raises:
        InputError: no text of one sample's length, none left to hold out, or no tokenizer.
    """
    options = job.options
    nothing = torch.empty((0, options.seq_len), dtype=torch.int64)
    factoring = _draw(job, options.num_samples, warn=True) if job.observers else nothing
    if options.max_loss is not None:
        flag, held = "--max-loss", HELD_OUT_FOR_BUDGET
    elif options.heal:
        flag, held = "--heal", HELD_OUT
    else:
        return CalibrationText(factoring, nothing, nothing)
    seen = {tuple(sample) for sample in factoring.tolist()}
    samples = _draw(job, len(seen) + options.heal + held, warn=False)
    fresh = [i for i, sample in enumerate(samples.tolist()) if tuple(sample) not in seen]
    if len(samples) < 2 or not fresh:
        raise InputError(
            f"{flag}: calibration text: expected 2 samples or more, one of them held out and not "
            f"factored on, found {len(samples)} and {len(fresh)} of that kind; give more text, or "
            "a smaller --num-samples or --seq-len"
        )
    held_out = fresh[: max(1, min(held, len(samples) // 4))]
    rest = [i for i in (*fresh, *range(len(samples))) if i not in held_out]
    training = samples[list(dict.fromkeys(rest))][: options.heal]
    return CalibrationText(factoring, training, samples[held_out])


def _draw(job: Job, num_samples: int, warn: bool) -> torch.Tensor:
    """``[num_samples, seq_len]``, or as many as the text has."""
    options, tokenizer = job.options, job.model.tokenizer()
    size = (num_samples, options.seq_len, options.seed)
    if options.dataset == SELF:
        dtype = calibration_dtype(job.model.dtype, job.device)
        return sample_self(job.model.load(dtype, job.device), tokenizer, *size)
    draw = draw_samples if warn else cut_samples
    return draw(documents(options.dataset, options.text_column), tokenizer, *size)
