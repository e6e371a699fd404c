"""``compress``: from a model directory to a compressed checkpoint."""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

from recalkv_vllm.base_digest import DIGEST_KEY, base_digest, local_files
from recalkv_vllm.checkpoint import AttentionGeometry, RecalkvConfig, read_hf_config
from recalkv_vllm.compression import source
from recalkv_vllm.compression.architectures import compressed_architecture
from recalkv_vllm.compression.card import model_card
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.factoring import ModelLayers, factor_layers
from recalkv_vllm.compression.latent_choice import candidates, rank_compression, relative_error
from recalkv_vllm.compression.methods import METHODS, Method, MethodOptions
from recalkv_vllm.compression.output_refit import OutputRefit
from recalkv_vllm.compression.quantised import quantisation_of
from recalkv_vllm.compression.ranks import LayerPlan
from recalkv_vllm.compression.samples import draw_samples
from recalkv_vllm.compression.self_text import SELF, sample_self
from recalkv_vllm.compression.statistics import (
    Statistics,
    collect,
    model_digest,
    samples_digest,
)
from recalkv_vllm.compression.summary import summarize
from recalkv_vllm.compression.targets import flop_per_byte
from recalkv_vllm.compression.text import describe, documents
from recalkv_vllm.compression.weights import tensor_shapes
from recalkv_vllm.compression.writer import (
    appearing,
    check_absent,
    write_checkpoint,
    write_factors,
)
from recalkv_vllm.latent_format import LatentFormat
from recalkv_vllm.version import __version__

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CompressOptions:
    """Options of ``recalkv compress``; the command line documents each."""

    model: str
    out: Path
    compression: float
    method: str = "kfac"
    k_group_size: int | None = None
    v_groups: int | None = None
    rank_allocation: str | None = None
    spans: str | None = None
    target: str = "h100"
    output_refit: bool | None = None
    latent_dtype: str = "bf16"
    dataset: str = "builtin"
    text_column: str = "text"
    num_samples: int = 256
    seq_len: int = 2048
    seed: int = 42
    device: str = "auto"
    dtype: str = "auto"
    factors_only: bool = False


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Calibration samples ``[samples, seq_len]``, their statistics, and where they are from."""

    samples: torch.Tensor
    statistics: Statistics
    provenance: dict[str, Any]


def compress(options: CompressOptions) -> dict[str, Any]:
    """Compress a model; the summary of the checkpoint, with ``seconds``.

    Raises:
        InputError: bad input; nothing is left at ``options.out``.
        CheckpointError: an unusable ``config.json``.
    """
    began = time.monotonic()
    if not 0 <= options.compression < 1:
        raise InputError(
            f"compression {options.compression}: expected a fraction in [0, 1); "
            "it is the part of the KV cache that is removed"
        )
    for name, least in (("num_samples", 1), ("seq_len", 2)):
        if getattr(options, name) < least:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} {getattr(options, name)}: expected at least {least}")
    check_absent(options.out)
    directory = source.find_model(options.model)
    config = read_hf_config(directory)
    compressed_architecture(config)  # refuses what is not supported
    quantisation = quantisation_of(config)
    if quantisation is not None:
        check_weights_stay(options)
    geometry = AttentionGeometry.from_hf_config(config)
    method = choose_method(options, geometry, heads_move=quantisation is None)
    formats = candidates(options.latent_dtype, method.knows_loss, options.compression, geometry)
    for form in formats:
        method.check(rank_compression(options.compression, geometry, form))
    device = source.choose_device(options.device)

    calibrated = _calibrate(options, directory, geometry, method, device)
    statistics = calibrated.statistics if calibrated else None
    own = source.own_dtype(directory)
    dtype = own if options.dtype == "auto" else source.DTYPES[options.dtype]
    refits = calibrated is not None and method.refits_output and options.output_refit is not False
    # Quantised weights stay as they are, and so do those that factors alone are served on.
    refits = refits and quantisation is None and not options.factors_only
    model = source.load_model(
        directory, source.calibration_dtype(own, device) if refits else own, "cpu"
    )
    layers = ModelLayers(model, geometry, statistics)
    form, plans = choose_plan(method, options.compression, formats, layers)
    refit = None
    if calibrated and refits:
        refit = OutputRefit(model, calibrated.samples, source.single_device(device), form)
    factors, errors = factor_layers(
        geometry, method, plans, layers, dtype, refit, rotate=form is not None
    )
    recalkv = RecalkvConfig(
        method=method.name,
        compression=options.compression,
        layers=tuple(part.layout for part in factors),
        settings={
            "base_model": directory.resolve().name
            if Path(options.model).exists()
            else options.model,
            **method.settings(),
            "output_refit": refit is not None,
            "rank_allocation": method.rank_allocation if options.compression else "full",
            "relative_error": errors,
        },
        calibration=calibrated.provenance if calibrated else {},
        latent_quantization=form,
        tool_versions={
            "recalkv_vllm": __version__,
            "safetensors": safetensors.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )
    summary = summarize(recalkv, geometry, dtype.itemsize)
    with appearing(options.out) as partial:
        convert = options.dtype != "auto"
        if options.factors_only:
            digest = base_digest(local_files(directory), geometry.num_layers)
            write_factors(partial, {**config, DIGEST_KEY: digest}, recalkv, factors)
        else:
            if quantisation is not None:
                settings = quantisation.with_dense_kv(tensor_shapes(directory))
                config = {**config, "quantization_config": settings}
            write_checkpoint(partial, directory, config, recalkv, factors, dtype, convert)
        card = model_card(options.out.name, recalkv.settings["base_model"], recalkv, summary)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return {**summary, "seconds": time.monotonic() - began}


def choose_plan(
    method: Method, compression: float, formats: list[LatentFormat | None], layers: ModelLayers
) -> tuple[LatentFormat | None, list[LayerPlan]]:
    """The format of least expected loss, and the ranks that go with it."""

    def plan(form: LatentFormat | None) -> list[LayerPlan]:
        of_numbers = rank_compression(compression, layers.geometry, form)
        return method.plan(of_numbers, layers, layers.statistics, relative_error(form))

    if len(formats) == 1:
        return formats[0], plan(formats[0])
    losses = {}
    for form in formats:
        plan(form)
        losses[form] = method.expected_loss
        log.info("latents in %s: expected loss %.5f", form or "16 bits", losses[form])
    best = min(losses, key=lambda form: losses[form])
    return best, plan(best)


def check_weights_stay(options: CompressOptions) -> None:
    """Raise :class:`InputError` for options that would change weights which are quantised."""
    if options.output_refit:
        raise InputError(
            "--output-refit: the model's weights are quantised and stay as they are; expected "
            "--no-output-refit, or the model before it was quantised"
        )
    if options.dtype != "auto" and not options.factors_only:
        raise InputError(
            f"--dtype {options.dtype}: the model's weights are quantised and stay as they are; "
            "expected auto, or --factors-only"
        )


def choose_method(
    options: CompressOptions, geometry: AttentionGeometry, heads_move: bool = True
) -> Method:
    """The method that the options name, its settings checked against the model.

    Args:
        options: of the command line.
        geometry: of the model.
        heads_move: see :class:`MethodOptions`.

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
        flop_per_byte(options.target),
        heads_move,
    )
    return METHODS[options.method](geometry, chosen)


def _calibrate(
    options: CompressOptions,
    directory: Path,
    geometry: AttentionGeometry,
    method: Method,
    device: str,
) -> Calibrated | None:
    """What the method needs of the calibration text; None if nothing."""
    observers = method.observers(options.compression)
    if not observers:
        return None
    tokenizer = source.load_tokenizer(directory)
    arithmetic = source.calibration_dtype(source.own_dtype(directory), device)
    size = (options.num_samples, options.seq_len, options.seed)
    if options.dataset == SELF:
        model = source.load_model(directory, arithmetic, device)
        samples = sample_self(model, tokenizer, *size)
        del model
    else:
        text = documents(options.dataset, options.text_column)
        samples = draw_samples(text, tokenizer, *size)
    digest = samples_digest(samples)
    identity = f"{model_digest(directory)} {digest} {arithmetic} {device.split(':')[0]}"
    statistics = collect(
        observers,
        samples,
        geometry,
        key=hashlib.blake2b(identity.encode(), digest_size=16).hexdigest(),
        load_model=lambda: source.load_model(directory, arithmetic, device),
    )
    provenance = {
        "dataset": describe(options.dataset),
        "samples": len(samples),
        "seq_len": options.seq_len,
        "seed": options.seed,
        "samples_digest": digest,
        "dtype": str(arithmetic).removeprefix("torch."),
    }
    return Calibrated(samples, statistics, provenance)
