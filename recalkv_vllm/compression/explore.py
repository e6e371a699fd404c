"""``explore``: plans at several compressions, group sizes and latent formats, none carried out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from recalkv_vllm.compression.calibration.calibrate import calibrate
from recalkv_vllm.compression.calibration.calibration_text import draw_text
from recalkv_vllm.compression.check import Job, at_compression, check_inputs, choose_method
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.methods.base import divisors
from recalkv_vllm.compression.options import CompressOptions
from recalkv_vllm.compression.pipeline import load_layers
from recalkv_vllm.compression.plan import ModelPlan
from recalkv_vllm.compression.ranks.front import on_front

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Explored:
    """One way to compress a model.

    Args:
        job: what ``compress`` would do; its options are those to give it.
        plan: of the job.
        decode_time: of attention, relative to the dense cache's; None where ``--target none`` names
            no device.
        on_front: whether no other way is as good in bytes, expected loss and decode time, and
            better in one.
    """

    job: Job
    plan: ModelPlan
    decode_time: float | None
    on_front: bool


def explore(
    options: CompressOptions, compressions: Sequence[float], latent_dtypes: Sequence[str]
) -> list[Explored]:
    """Plans of method ``kfac`` for every group size that the model allows.

    Calibrates once; layers are measured once for every group size and order of heads.

    Args:
        options: of model, target and calibration.
        compressions: fractions of the KV cache to remove.
        latent_dtypes: as ``--latent-dtype`` of ``compress`` names them.

    Returns:
        By compression, then format, then group size; those that cannot be reached are left out.

    Raises:
        InputError: bad input, or none can be reached.
    """
    jobs = reachable_jobs(options, compressions, latent_dtypes)
    calibration = calibrate(jobs[0], draw_text(jobs[0]).factoring)
    layers = load_layers(jobs[0], calibration)
    measured: dict[tuple[type, int | None], Any] = {}
    planned: dict[tuple[str, ModelPlan], Job] = {}
    for job in jobs:
        key = type(job.method), job.options.k_group_size
        measured[key] = job.method.measure(
            job.budget.compression, layers, layers.statistics, measured.get(key)
        )
        try:
            plan = job.method.plan(measured[key], job.budget)
        except InputError as error:  # only the measured widths tell
            if job is jobs[-1] and not planned:
                raise
            _leave_out(job, error)
        else:
            # A format may remove more than was asked for: of one plan, the largest compression.
            planned.pop((job.options.latent_dtype, plan), None)
            planned[job.options.latent_dtype, plan] = job
    return _compared([(job, plan) for (_, plan), job in planned.items()])


def reachable_jobs(
    options: CompressOptions, compressions: Sequence[float], latent_dtypes: Sequence[str]
) -> list[Job]:
    """One job for each way to compress that can be reached, as far as is known before any work.

    Raises:
        InputError: bad input, or none can be reached.
    """
    for compression in compressions:
        if not 0 < compression < 1:
            raise InputError(
                f"--compression {compression:g}: expected fractions above 0 and below 1"
            )
    # At full rank there is nothing that cannot be reached.
    base = check_inputs(replace(options, compression=0.0, latent_dtype="bf16"))
    geometry, keeps_order = base.model.geometry, base.model.weight_format is None
    jobs: list[Job] = []
    left_out: list[tuple[Job, InputError]] = []
    for compression in sorted(set(compressions)):
        for latent_dtype in dict.fromkeys(latent_dtypes):
            for size in divisors(geometry.num_kv_heads):
                own = replace(
                    base.options,
                    compression=compression,
                    latent_dtype=latent_dtype,
                    k_group_size=size,
                    target=str(base.target),
                )
                method = choose_method(own, compression, geometry, base.target, keeps_order)
                job = replace(base, options=own, compression=compression, method=method)
                try:
                    jobs.append(_with_known_loss(at_compression(job, compression)))
                except InputError as error:
                    left_out.append((job, error))
    if not jobs:
        raise left_out[0][1]
    for each in left_out:
        _leave_out(*each)
    return jobs


def _with_known_loss(job: Job) -> Job:
    """The job. Raises :class:`InputError` for one of full rank, which has no expected loss."""
    if job.budget.compression == 0:
        raise InputError(
            f"compression {job.compression:g}: {job.options.latent_dtype} removes more than that "
            "at full rank; expected a higher one"
        )
    return job


def _leave_out(job: Job, error: InputError) -> None:
    options = job.options
    log.info("left out: %s, k_group_size %s: %s", options.latent_dtype, options.k_group_size, error)


def _compared(planned: Sequence[tuple[Job, ModelPlan]]) -> list[Explored]:
    times = [job.method.decode_time(plan) for job, plan in planned]
    costs = [
        (plan.token_bytes(2), float(f"{plan.expected_loss:.9g}"), time or 0.0)
        for (_, plan), time in zip(planned, times, strict=True)
    ]
    front = on_front(costs)
    return [
        Explored(job, plan, time, best)
        for (job, plan), time, best in zip(planned, times, front, strict=True)
    ]
