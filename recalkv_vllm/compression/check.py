"""The first stage of compression: options checked against the model, before any work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.base_model.devices import choose_device
from recalkv_vllm.compression.base_model.model import DTYPES, BaseModel
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.latents.format_choice import budget_of, chosen_latent_dtype
from recalkv_vllm.compression.methods import METHODS, KfacBands, Method, MethodOptions
from recalkv_vllm.compression.options import CompressOptions
from recalkv_vllm.compression.output.atomic_directory import check_absent
from recalkv_vllm.compression.plan import Budget
from recalkv_vllm.compression.ranks.targets import chosen_target, flop_per_byte


@dataclass(frozen=True, slots=True)
class Job:
    """A compression that is known to be possible.

    Args:
        options: as given.
        model: the base model.
        method: with the options' settings.
        budget: of the compressed cache.
        device: where to calibrate.
        target: the device that reconstruction is limited for.
    """

    options: CompressOptions
    model: BaseModel
    method: Method[Any]
    budget: Budget
    device: str
    target: str

    @property
    def dtype(self) -> torch.dtype:
        """Of the written weights and factors."""
        return self.model.dtype if self.options.dtype == "auto" else DTYPES[self.options.dtype]

    @property
    def observers(self) -> set[str]:
        """Names of the statistics that the method needs; without any there is no calibration."""
        return self.method.observers(self.options.compression)

    @property
    def weights_may_change(self) -> bool:
        """Quantized weights stay as they are, and so do those that factors alone are served on."""
        return self.model.weight_format is None and not self.options.factors_only

    @property
    def refits_output(self) -> bool:
        """Whether ``o_proj`` follows the factors, which takes calibration samples."""
        return (
            self.method.refits_output
            and bool(self.observers)
            and self.options.output_refit is not False
            and self.weights_may_change
        )


def check(options: CompressOptions) -> Job:
    """Check everything that can be checked without loading weights or text.

    Raises:
        InputError: bad input.
        CheckpointError: an unusable ``config.json``.
    """
    if not 0 <= options.compression < 1:
        raise InputError(
            f"compression {options.compression}: expected a fraction in [0, 1); "
            "it is the part of the KV cache that is removed"
        )
    for name, least in (("num_samples", 1), ("seq_len", 2)):
        if getattr(options, name) < least:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} {getattr(options, name)}: expected at least {least}")
    if options.heal < 0:
        raise InputError(f"--heal {options.heal}: expected a number of steps")
    if options.heal and options.compression == 0:
        raise InputError("--heal: full rank is exact; expected a --compression above 0")
    check_absent(options.out)
    model = BaseModel.find(options.model)
    model.architecture  # noqa: B018 (refuses what is not supported)
    if model.weight_format is not None:
        check_weights_stay(options)
    target = chosen_target(options.target)
    method = choose_method(options, model.geometry, target, model.weight_format is None)
    budget = budget_of(options.compression, model.geometry, latent_dtype(options))
    method.check(budget.compression)
    return Job(options, model, method, budget, choose_device(options.device), target)


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
    geometry: AttentionGeometry,
    target: str,
    allow_head_reordering: bool = True,
) -> Method[Any]:
    """The method that the options name, its settings checked against the model.

    Args:
        options: of the command line.
        geometry: of the model.
        target: as :func:`chosen_target` gives it.
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
        flop_per_byte(target),
        allow_head_reordering,
    )
    method = KfacBands if latent_dtype(options) == "bands" else METHODS[options.method]
    return method(geometry, chosen)


def latent_dtype(options: CompressOptions) -> str:
    """How the options want latents stored; see :func:`chosen_latent_dtype`."""
    chooses = METHODS[options.method].knows_loss
    return chosen_latent_dtype(options.latent_dtype, chooses, options.compression)
