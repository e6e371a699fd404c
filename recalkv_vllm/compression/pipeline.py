"""``compress``: from a model directory to a compressed checkpoint, in six stages, or seven."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import safetensors
import torch
import transformers

from recalkv_vllm.checkpoint import RecalkvConfig
from recalkv_vllm.compression.base_model.devices import calibration_dtype, single_device
from recalkv_vllm.compression.calibration.calibrate import Calibration, calibrate
from recalkv_vllm.compression.calibration.calibration_text import CalibrationText, draw_text
from recalkv_vllm.compression.check import Job, at_compression, check
from recalkv_vllm.compression.factoring.factor_layers import ModelLayers, factor_layers
from recalkv_vllm.compression.factoring.output_refit import OutputRefit
from recalkv_vllm.compression.healing.heal import heal
from recalkv_vllm.compression.layer import LayerFactors
from recalkv_vllm.compression.loss_budget import (
    LossMeter,
    most_compressed,
    reachable_compressions,
)
from recalkv_vllm.compression.options import CompressOptions
from recalkv_vllm.compression.output.atomic_directory import atomic_directory
from recalkv_vllm.compression.output.card import model_card
from recalkv_vllm.compression.output.summary import summarize
from recalkv_vllm.compression.output.writer import write_checkpoint, write_factors_only
from recalkv_vllm.compression.plan import ModelPlan
from recalkv_vllm.compression.ranks.targets import ANYWHERE
from recalkv_vllm.version import __version__

#: Settings of a checkpoint that ``compress`` tells of, besides the summary.
TOLD = ("target", "relative_decode_time", "expected_loss", "expected_loss_anywhere")


def compress(options: CompressOptions) -> dict[str, Any]:
    """Compress a model; the summary of the checkpoint, with the settings :data:`TOLD`, ``seconds``,
    and ``loss`` in nats per token if there is a budget of it.

    Raises:
        InputError: bad input; nothing is left at ``options.out``.
        CheckpointError: an unusable ``config.json``.
    """
    began = time.monotonic()
    job = check(options)
    text = draw_text(job)
    calibration = calibrate(job, text.factoring)
    if options.max_loss is None:
        made = make_factors(job, calibration, text)
    else:
        made = within_loss(job, options.max_loss, calibration, text)
    recalkv = describe(made, calibration)
    summary = summarize(recalkv, job.model.geometry, job.dtype.itemsize)
    write(job, recalkv, made.factors, summary)
    told = {name: recalkv.settings.get(name) for name in TOLD}
    told["seconds"] = time.monotonic() - began
    return {**summary, **({} if made.loss is None else {"loss": made.loss}), **told}


@dataclass(frozen=True, slots=True)
class Made:
    """Factors of all layers at one compression, and how they came about.

    Args:
        job: of the compression.
        measured: of the layers by the job's method, for other compressions.
        plan: that was carried out.
        factors: of all layers.
        errors: relative errors of the factors, before healing.
        healing: what came of it, if it was asked for.
        loss: of held-out text, in nats per token above the dense model's; None if not measured.
    """

    job: Job
    measured: Any
    plan: ModelPlan
    factors: list[LayerFactors]
    errors: dict[str, Any]
    healing: dict[str, Any] | None
    loss: float | None


def make_factors(
    job: Job,
    calibration: Calibration | None,
    text: CalibrationText,
    meter: LossMeter | None = None,
    measured: Any = None,
) -> Made:
    """Plan, factor and, as far as they are asked for, heal and measure the loss.

    Args:
        job: of the compression.
        calibration: None where none was needed.
        text: to heal on.
        meter: of losses; None measures none.
        measured: by the job's method at another compression.

    Raises:
        InputError: factors or losses that are not finite.
    """
    layers = load_layers(job, calibration)
    measured = job.method.measure(job.budget.compression, layers, layers.statistics, measured)
    plan = job.method.plan(measured, job.budget)
    factors, errors = factor(job, calibration, layers, plan)
    formats = [plan.latent_format(i) for i in range(len(factors))]
    healing = loss = None
    if job.options.heal:
        factors, healing = heal(job, layers.model, factors, formats, text)
    if meter is not None:
        loss = meter.loss(layers.model, factors, formats)
    return Made(job, measured, plan, factors, errors, healing, loss)


def within_loss(
    job: Job, max_loss: float, calibration: Calibration | None, text: CalibrationText
) -> Made:
    """The most compressed factors that lose ``max_loss`` nats per token at most.

    Raises:
        InputError: none do.
    """
    meter = LossMeter(job, text.held_out)
    measured = None

    def attempt(compression: float) -> tuple[Made, float]:
        nonlocal measured
        made = make_factors(at_compression(job, compression), calibration, text, meter, measured)
        measured = made.measured
        assert made.loss is not None
        return made, made.loss

    return most_compressed(max_loss, reachable_compressions(job), attempt)


def load_layers(job: Job, calibration: Calibration | None) -> ModelLayers:
    """The model's layers in memory; a refit may run them, in the precision of the calibration."""
    model = job.model
    dtype = calibration_dtype(model.dtype, job.device) if job.may_refit_output else model.dtype
    statistics = calibration.statistics if calibration else None
    return ModelLayers(model.load(dtype, "cpu"), model.geometry, statistics)


def factor(
    job: Job, calibration: Calibration | None, layers: ModelLayers, plan: ModelPlan
) -> tuple[list[LayerFactors], dict[str, Any]]:
    """Factors of all layers and their relative errors, as :func:`factor_layers` gives them."""
    refit = None
    if calibration and job.refits_output(plan):
        device = single_device(job.device)
        refit = OutputRefit(layers.model, calibration.samples, device, plan)
    return factor_layers(job.method, plan, layers, job.dtype, refit)


def describe(made: Made, calibration: Calibration | None) -> RecalkvConfig:
    """What to record of a compression; ``calibration`` is None where none was needed."""
    job, plan = made.job, made.plan
    optional = {"max_loss": job.options.max_loss, "loss": made.loss, "healing": made.healing}
    return RecalkvConfig(
        method=job.method.name,
        compression=job.compression,
        layers=plan.layouts,
        settings={
            "base_model": job.model.name,
            **job.method.settings(plan),
            **(_about_target(made) if job.method.knows_loss else {}),
            "output_refit": job.refits_output(plan),
            "rank_allocation": job.method.rank_allocation if job.compression else "full",
            "relative_error": made.errors,
            **{name: value for name, value in optional.items() if value is not None},
        },
        calibration=calibration.provenance if calibration else {},
        latent_quantization=plan.uniform_format,
        tool_versions={
            "recalkv_vllm": __version__,
            "safetensors": safetensors.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def _about_target(made: Made) -> dict[str, Any]:
    """What the plan is made for, and what would be lost by expectation if decoding took any time;
    None at full rank, where it is not known."""
    job, loss = made.job, made.plan.expected_loss
    if math.isnan(loss):
        anywhere = None
    elif job.target == ANYWHERE:
        anywhere = loss
    else:
        anywhere = job.method.loss_anywhere(made.measured, job.budget)
    return {"target": str(job.target), "expected_loss_anywhere": anywhere}


def write(
    job: Job, recalkv: RecalkvConfig, factors: Sequence[LayerFactors], summary: dict[str, Any]
) -> None:
    """Write the checkpoint, or the factors alone, with a model card.

    Raises:
        OutputError: it cannot be written; nothing is left.
    """
    options = job.options
    with atomic_directory(options.out) as partial:
        if options.factors_only:
            write_factors_only(partial, job.model, recalkv, factors)
        else:
            convert = options.dtype != "auto"
            write_checkpoint(partial, job.model, recalkv, factors, job.dtype, convert)
        card = model_card(options.out.name, job.model.name, recalkv, summary)
        (partial / "README.md").write_text(card, encoding="utf-8")
