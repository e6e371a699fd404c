"""The first stage of compression: options checked against the model, before any work."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.base_model.devices import choose_device
from recalkv_vllm.compression.base_model.model import DTYPES, BaseModel
from recalkv_vllm.compression.errors import InputError, check_least
from recalkv_vllm.compression.latents.format_choice import budget_of, chosen_latent_dtype
from recalkv_vllm.compression.methods import METHODS, KfacBands, Method, MethodOptions
from recalkv_vllm.compression.options import CompressOptions
from recalkv_vllm.compression.output.atomic_directory import check_absent
from recalkv_vllm.compression.plan import Budget, ModelPlan
from recalkv_vllm.compression.ranks.targets import Target, parse_target

#: What a budget of loss chooses from.
LOSS_BUDGET_COMPRESSIONS = tuple(percent / 100 for percent in range(1, 100))


#: Expected loss in nats per token from which a refit of ``o_proj`` is the default. Below, the refit
#: costs minutes and accuracy: closest attention outputs are not closest predictions. (SmolLM2: loss
#: of .0087 -> .0102 and .0031 -> .0042, but .0366 -> .0298 and .0693 -> .0590.)
REFIT_LOSS = 0.02


@dataclass(frozen=True, slots=True)
class Job:
    """A compression that is known to be possible.

    Args:
        options: as given.
        compression: fraction of the KV cache to remove.
        model: the base model.
        method: with the options' settings.
        budget: of the compressed cache.
        device: where to calibrate.
        target: the device to serve on, and how long decoding may take there.
    """

    options: CompressOptions
    compression: float
    model: BaseModel
    method: Method[Any]
    budget: Budget
    device: str
    target: Target

    @property
    def dtype(self) -> torch.dtype:
        """Of the written weights and factors."""
        return self.model.dtype if self.options.dtype == "auto" else DTYPES[self.options.dtype]

    @property
    def observers(self) -> set[str]:
        """Names of the statistics that the method needs; without any there is no calibration."""
        return self.method.observers(self.compression)

    @property
    def weights_may_change(self) -> bool:
        """Quantized weights stay as they are, and so do those that factors alone are served on."""
        return self.model.weight_format is None and not self.options.factors_only

    @property
    def may_refit_output(self) -> bool:
        """Whether ``o_proj`` may follow the factors, which takes calibration samples."""
        return (
            self.method.refits_output
            and bool(self.observers)
            and self.options.output_refit is not False
            and self.weights_may_change
        )

    def refits_output(self, plan: ModelPlan) -> bool:
        """Whether ``o_proj`` follows the factors of ``plan``."""
        wanted = self.options.output_refit or plan.expected_loss >= REFIT_LOSS
        return self.may_refit_output and wanted


def check(options: CompressOptions) -> Job:
    """Check everything that can be checked without loading weights or text.

    The job of a budget of loss is that of the least compression to try.

    Raises:
        InputError: bad input.
        CheckpointError: an unusable ``config.json``.
    """
    check_absent(options.out)
    return check_inputs(options)


def check_inputs(options: CompressOptions) -> Job:
    """As :func:`check`, for a job that writes nothing: ``options.out`` is not looked at."""
    compression = check_budgets(options)
    check_least(options, num_samples=1, seq_len=2)
    check_datasets(options)
    if options.heal < 0:
        raise InputError(f"--heal {options.heal}: expected a number of steps")
    if options.heal and compression == 0:
        raise InputError("--heal: full rank is exact; expected a --compression above 0")
    model = BaseModel.find(options.model)
    model.architecture  # noqa: B018 (refuses what is not supported)
    if model.weight_format is not None:
        check_weights_stay(options)
    target = parse_target(options.target)
    method = choose_method(
        options, compression, model.geometry, target, model.weight_format is None
    )
    budget = checked_budget(options, compression, model.geometry, method)
    device = choose_device(options.device)
    return Job(options, compression, model, method, budget, device, target)


def check_budgets(options: CompressOptions) -> float:
    """The compression of a budget of bytes; of a budget of loss, the least to try.

    Raises:
        InputError: none of the two budgets, both, or one outside of its range.
    """
    if options.max_loss is None:
        if options.compression is None:
            raise InputError("--compression: expected it or --max-loss, found none")
        if not 0 <= options.compression < 1:
            raise InputError(
                f"compression {options.compression}: expected a fraction in [0, 1); "
                "it is the part of the KV cache that is removed"
            )
        return options.compression
    if options.compression is not None:
        raise InputError("--compression: expected it or --max-loss, found both")
    if not 0 < options.max_loss < math.inf:
        raise InputError(f"--max-loss {options.max_loss:g}: expected a positive number of nats")
    return LOSS_BUDGET_COMPRESSIONS[0]


def at_compression(job: Job, compression: float) -> Job:
    """The same job for a compression.

    Raises:
        InputError: it cannot be reached.
    """
    budget = checked_budget(job.options, compression, job.model.geometry, job.method)
    return replace(job, compression=compression, budget=budget)


def checked_budget(
    options: CompressOptions, compression: float, geometry: AttentionGeometry, method: Method[Any]
) -> Budget:
    """What a plan may spend. Raises :class:`InputError` where the method cannot do with it."""
    budget = budget_of(compression, geometry, latent_dtype(options, compression))
    method.check(budget.compression)
    return budget


def check_datasets(options: CompressOptions) -> None:
    """Raise :class:`InputError` for a dataset named twice, or one that no sample is left for."""
    for index, dataset in enumerate(options.datasets):
        if dataset in options.datasets[:index]:
            raise InputError(f"--dataset {dataset}: found twice; expected each dataset once")
    if options.num_samples < len(options.datasets):
        raise InputError(
            f"--num-samples {options.num_samples}: expected at least {len(options.datasets)}, "
            f"one of each dataset ({', '.join(options.datasets)})"
        )


def check_weights_stay(options: CompressOptions) -> None:
    """Raise :class:`InputError` for options that would change weights which are quantized."""
    if options.output_refit:
        raise InputError(
            "--output-refit: the model's weights are quantized and stay as they are; expected "
            "--no-output-refit, or the model before it was quantized"
        )
    if options.heal and not options.factors_only:
        raise InputError(
            "--heal: the model's weights are quantized and stay as they are; expected "
            "--factors-only, since factors alone can heal"
        )
    if options.dtype != "auto" and not options.factors_only:
        raise InputError(
            f"--dtype {options.dtype}: the model's weights are quantized and stay as they are; "
            "expected auto, or --factors-only"
        )


def choose_method(
    options: CompressOptions,
    compression: float,
    geometry: AttentionGeometry,
    target: Target,
    allow_head_reordering: bool = True,
) -> Method[Any]:
    """The method that the options name, its settings checked against the model.

    Args:
        options: of the command line.
        compression: fraction of the KV cache to remove.
        geometry: of the model.
        target: as :func:`parse_target` gives it.
        allow_head_reordering: see :class:`MethodOptions`.

    Raises:
        InputError: an unknown method, or groups that do not divide the KV heads.
    """
    if options.method not in METHODS:
        raise InputError(
            f"method {options.method!r}: unknown; expected one of {', '.join(sorted(METHODS))}"
        )
    chosen = MethodOptions(
        options.k_group_size,
        options.v_groups,
        options.rank_allocation,
        options.spans,
        target,
        allow_head_reordering,
    )
    method = KfacBands if latent_dtype(options, compression) == "bands" else METHODS[options.method]
    return method(geometry, chosen)


def latent_dtype(options: CompressOptions, compression: float) -> str:
    """How the options want latents stored; see :func:`chosen_latent_dtype`."""
    chooses = METHODS[options.method].knows_loss
    return chosen_latent_dtype(options.latent_dtype, chooses, compression)
