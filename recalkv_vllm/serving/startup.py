"""What is refused before an engine starts, each in one line that names it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import replace

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from recalkv_vllm.checkpoint import (
    AttentionGeometry,
    CheckpointError,
    FactorReader,
    RecalkvConfig,
    kv_bytes_per_token,
)
from recalkv_vllm.serving.connectors import unsupported_connector
from recalkv_vllm.serving.registration import ARCHITECTURES, BACKEND_NAME

logger = logging.getLogger(__name__)

#: Ways of speculation that give the stock model's tokens in our tests.
TESTED_SPECULATION = ("ngram", "draft_model")


class ServingError(SystemExit, ValueError):
    """A configuration that we refuse.

    A ``ValueError`` for programs that catch it; a ``SystemExit`` so that ``vllm serve`` ends with
    the message alone and a non-zero status instead of a traceback.
    """

    def __str__(self) -> str:
        return str(self.code)


def check_engine_config(engine_args: type) -> None:
    """Make ``engine_args.create_engine_config`` check what it made; once per class.

    Wraps methods because vLLM 0.32 gives plugins no place to refuse a configuration: on CPU a
    stock model under ``--attention-backend recalkv`` would silently run vLLM's own attention. Can
    go when platforms ask an out-of-tree backend too, or when vLLM validates through a hook.
    """
    create, parse = engine_args.create_engine_config, engine_args.from_cli_args.__func__
    if getattr(create, "checked_by_recalkv", False):
        return

    @functools.wraps(parse)
    def from_cli_args(cls, args):
        made = parse(cls, args)
        # Adapters that the server loads at its start; vLLM keeps them from the engine's arguments.
        made.recalkv_adapters = [module.path for module in getattr(args, "lora_modules", ()) or ()]
        return made

    @functools.wraps(create)
    def create_engine_config(self, *args, **kwargs) -> VllmConfig:
        config = create(self, *args, **kwargs)
        refuse_unservable(config, getattr(self, "recalkv_adapters", ()))
        return config

    create_engine_config.checked_by_recalkv = True
    engine_args.create_engine_config = create_engine_config
    engine_args.from_cli_args = classmethod(from_cli_args)


def refuse_unservable(config: VllmConfig, adapters: Sequence[str] = ()) -> None:
    """Raise :class:`ServingError` if we could not serve ``config`` and LoRA adapters faithfully."""
    from recalkv_vllm.serving.factors import adopt_separate_factors, names_separate_factors
    from recalkv_vllm.serving.lora import check_adapter, check_adapters_of_requests, served_layers

    requested = config.attention_config.backend
    requested = None if requested is None else requested.name
    architectures = config.model_config.architectures
    separate = names_separate_factors(config.model_config)
    if not any(name in ARCHITECTURES for name in architectures):
        if separate:
            raise ServingError(
                f"recalkv: --hf-overrides: expected the factors' architectures beside recalkv, "
                f"found {', '.join(architectures)}"
            )
        if requested == BACKEND_NAME:
            raise ServingError(
                f"recalkv: {config.model_config.model}: expected a compressed checkpoint for "
                f"--attention-backend recalkv, found {', '.join(architectures)} without factors; "
                f"make one with: recalkv compress {config.model_config.model} -o OUT "
                f"--compression 0.5"
            )
        return
    if reason := _unsupported_feature(config, requested):
        raise ServingError(f"recalkv: {reason}")
    try:
        if separate:
            adopt_separate_factors(config.model_config)
        _check_checkpoint(config)
        for adapter in adapters:
            check_adapter(adapter, served_layers(config))
    except (CheckpointError, ValueError) as error:
        raise ServingError(f"recalkv: {error}") from None
    if config.lora_config is not None:
        check_adapters_of_requests()
    if config.speculative_config is not None:
        # A draft model may inherit the backend, and is a stock model; our layers need no flag.
        config.attention_config.backend = None


def _unsupported_feature(config: VllmConfig, requested: str | None) -> str | None:
    from recalkv_vllm.serving.backend import SUPPORTED_DTYPES

    parallel, model = config.parallel_config, config.model_config
    speculative, transfer = config.speculative_config, config.kv_transfer_config
    connector = transfer and unsupported_connector(
        transfer.kv_connector, transfer.kv_connector_extra_config, not current_platform.is_cpu()
    )
    refusals = {
        f"--attention-backend: expected recalkv for a compressed checkpoint, found {requested}": (
            requested not in (None, BACKEND_NAME)
        ),
        f"--dtype: expected one of {SUPPORTED_DTYPES}, found {model.dtype}": (
            model.dtype not in SUPPORTED_DTYPES
        ),
        "--decode-context-parallel-size: expected 1, found "
        f"{parallel.decode_context_parallel_size}": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size: expected 1, found "
        f"{parallel.prefill_context_parallel_size}": parallel.prefill_context_parallel_size > 1,
        f"--kv-transfer-config: {connector}": connector is not None,
        "--enable-sleep-mode: not supported: a wake-up from level 2 would not restore the factors "
        "that kernels hold packed": bool(getattr(model, "enable_sleep_mode", False)),
        f"--speculative-config: expected method {' or '.join(TESTED_SPECULATION)}, found "
        f"{speculative and speculative.method}": (
            speculative is not None and speculative.method not in TESTED_SPECULATION
        ),
        # The stock proposer takes the first group's blocks for the draft's, whichever they are.
        "--speculative-config: draft_model does not go with sliding-window layers": (
            speculative is not None
            and speculative.method == "draft_model"
            and bool(getattr(model.hf_config, "sliding_window", None))
        ),
    }
    return next((message for message, refused in refusals.items() if refused), None)


def _check_checkpoint(config: VllmConfig) -> None:
    """Read every factor once, and cut it as the ranks will, before any process is started."""
    from recalkv_vllm.serving.cache_size import check_cache_size
    from recalkv_vllm.serving.factors import SEPARATE_FACTORS, locate_factors
    from recalkv_vllm.serving.latent_dtype import served_format
    from recalkv_vllm.serving.metrics import publish
    from recalkv_vllm.serving.sharding import shard_latent

    hf_config = config.model_config.hf_config.to_dict()
    recalkv = RecalkvConfig.from_hf_config(hf_config, f"{config.model_config.model}/config.json")
    form = served_format(
        recalkv.latent_quantization, config.cache_config.cache_dtype, config.model_config.dtype
    )
    geometry = AttentionGeometry.from_hf_config(hf_config)
    if hf_config.get(SEPARATE_FACTORS) and config.quant_config is not None:
        for i, layout in enumerate(recalkv.layers):
            if layout.head_order != tuple(range(geometry.num_kv_heads)):
                raise CheckpointError(
                    f"factors of layer {i}: expected heads in natural order over quantised "
                    f"weights, found {list(layout.head_order)}; compress with --k-group-size 1"
                )
    tp_size = config.parallel_config.tensor_parallel_size
    for i, layout in enumerate(recalkv.layers):
        ranks = {shard_latent(layout, geometry, r, tp_size).rank for r in range(tp_size)}
        if len(ranks) > 1:
            raise CheckpointError(
                f"tensor_parallel_size: with {tp_size} ranks, layer {i} would cache "
                f"{' and '.join(map(str, sorted(ranks)))} numbers per token on different ranks"
            )
    served = replace(recalkv, latent_quantization=form)
    check_cache_size(config, served, geometry)
    if config.load_config.load_format == "dummy":
        return
    with FactorReader(locate_factors(config.model_config), recalkv, geometry) as reader:
        reader.check()
    itemsize = config.model_config.dtype.itemsize
    sizes = kv_bytes_per_token(served, geometry, itemsize)
    logger.info(
        "recalkv: method %s, %d KV-cache bytes per token instead of %d (%.1f %% removed); what a "
        "device holds is told by: recalkv plan %s --max-model-len %d --memory SIZE",
        recalkv.method,
        sizes["compressed"],
        sizes["dense"],
        100 * (1 - sizes["compressed"] / sizes["dense"]),
        config.model_config.model,
        config.model_config.max_model_len,
    )
    plain_dtype = str(config.model_config.dtype).removeprefix("torch.")
    latent_dtype = plain_dtype if form is None else form.dtype
    publish(config.model_config.served_model_name, recalkv, latent_dtype, sizes)
    if form != recalkv.latent_quantization:
        plain = kv_bytes_per_token(recalkv, geometry, itemsize)["compressed"]
        logger.info(
            "recalkv: --kv-cache-dtype %s: latents are cached as e4m3 numbers with a scale per %d, "
            "which holds %.2f times the tokens of %s latents",
            config.cache_config.cache_dtype,
            form.group_size,
            plain / sizes["compressed"],
            plain_dtype,
        )
