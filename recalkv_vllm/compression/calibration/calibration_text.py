"""Who gets to see which part of the calibration text; all of it is drawn before any work."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recalkv_vllm.compression.base_model.devices import calibration_dtype
from recalkv_vllm.compression.calibration.calibrate import draw
from recalkv_vllm.compression.calibration.samples import token_ids
from recalkv_vllm.compression.check import Job
from recalkv_vllm.compression.errors import InputError

#: Samples that are held out, if there are four times as many: for healing,
HELD_OUT = 4
#: and for a budget of loss.
HELD_OUT_FOR_BUDGET = 16


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """Samples ``[samples, seq_len]``, by what is done with them; there may be none.

    Args:
        factoring: that statistics and the output refit see; as :func:`..calibrate.draw` gives
            them, the others as token ids.
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
    factored = options.num_samples if job.observers else 0
    if options.max_loss is not None:
        flag, held = "--max-loss", HELD_OUT_FOR_BUDGET
    else:
        flag, held = "--heal", HELD_OUT if options.heal else 0
    wanted = factored + options.heal + held
    if wanted == 0:
        nothing = torch.empty((0, options.seq_len), dtype=torch.int64)
        return CalibrationText(nothing, nothing, nothing)
    dtype = calibration_dtype(job.model.dtype, job.device)
    samples = draw(job.model, options, dtype, job.device, wanted)
    factoring, fresh = samples[:factored], samples[factored:]
    if held and (len(samples) < 2 or len(fresh) == 0):
        raise InputError(
            f"{flag}: calibration text: expected 2 samples or more, one of them held out and not "
            f"factored on, found {len(samples)} and {len(fresh)} of that kind; give more text, or "
            "a smaller --num-samples or --seq-len"
        )
    held = min(held, max(1, len(samples) // 4))
    training = torch.cat((fresh[held:], factoring))[: options.heal]
    return CalibrationText(factoring, token_ids(training), token_ids(fresh[:held]))
