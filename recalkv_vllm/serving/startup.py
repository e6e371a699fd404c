"""What is refused before an engine starts, each in one line that names it."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace

from vllm.config import VllmConfig

from recalkv_vllm.checkpoint import (
    AttentionGeometry,
    CheckpointError,
    FactorReader,
    RecalkvConfig,
    kv_bytes_per_token,
)
from recalkv_vllm.serving.registration import ARCHITECTURES, BACKEND_NAME

logger = logging.getLogger(__name__)


class ServingError(SystemExit, ValueError):
    """A configuration that we refuse.

    A ``ValueError`` for programs that catch it; a ``SystemExit`` so that ``vllm serve`` ends with
    the message alone and a non-zero status instead of a traceback.
    """

    def __str__(self) -> str:
        return str(self.code)


def check_engine_config(engine_args: type) -> None:
    """Make ``engine_args.create_engine_config`` check what it made; once per class.

    Wraps a method because vLLM 0.32 gives plugins no place to refuse a configuration: on CPU a
    stock model under ``--attention-backend recalkv`` would silently run vLLM's own attention. Can
    go when platforms ask an out-of-tree backend too, or when vLLM validates through a hook.
    """
    create = engine_args.create_engine_config
    if getattr(create, "checked_by_recalkv", False):
        return

    @functools.wraps(create)
    def create_engine_config(self, *args, **kwargs) -> VllmConfig:
        config = create(self, *args, **kwargs)
        refuse_unservable(config)
        return config

    create_engine_config.checked_by_recalkv = True
    engine_args.create_engine_config = create_engine_config


def refuse_unservable(config: VllmConfig) -> None:
    """Raise :class:`ServingError` if we could not serve ``config`` faithfully."""
    requested = config.attention_config.backend
    requested = None if requested is None else requested.name
    architectures = config.model_config.architectures
    if not any(name in ARCHITECTURES for name in architectures):
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
        _check_checkpoint(config)
    except (CheckpointError, ValueError) as error:
        raise ServingError(f"recalkv: {error}") from None


def _unsupported_feature(config: VllmConfig, requested: str | None) -> str | None:
    from recalkv_vllm.serving.backend import SUPPORTED_DTYPES

    parallel, model = config.parallel_config, config.model_config
    speculative = config.speculative_config
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
        "--enable-lora: not supported with compressed keys and values": (
            config.lora_config is not None
        ),
        "--kv-transfer-config: KV connectors are not supported with latents": (
            config.kv_transfer_config is not None
        ),
        "--enable-sleep-mode: not supported": bool(getattr(model, "enable_sleep_mode", False)),
        "--speculative-config: only method ngram is supported, found "
        f"{speculative and speculative.method}": (
            speculative is not None and speculative.method != "ngram"
        ),
    }
    return next((message for message, refused in refusals.items() if refused), None)


def _check_checkpoint(config: VllmConfig) -> None:
    """Read every factor once, and cut it as the ranks will, before any process is started."""
    from recalkv_vllm.serving.factors import locate_factors
    from recalkv_vllm.serving.latent_dtype import served_format
    from recalkv_vllm.serving.sharding import shard_latent

    hf_config = config.model_config.hf_config.to_dict()
    recalkv = RecalkvConfig.from_hf_config(hf_config, f"{config.model_config.model}/config.json")
    form = served_format(
        recalkv.latent_quantization, config.cache_config.cache_dtype, config.model_config.dtype
    )
    geometry = AttentionGeometry.from_hf_config(hf_config)
    tp_size = config.parallel_config.tensor_parallel_size
    for i, layout in enumerate(recalkv.layers):
        ranks = {shard_latent(layout, geometry, r, tp_size).rank for r in range(tp_size)}
        if len(ranks) > 1:
            raise CheckpointError(
                f"tensor_parallel_size: with {tp_size} ranks, layer {i} would cache "
                f"{' and '.join(map(str, sorted(ranks)))} numbers per token on different ranks"
            )
    if config.load_config.load_format == "dummy":
        return
    with FactorReader(locate_factors(config.model_config), recalkv, geometry) as reader:
        for i in range(geometry.num_layers):
            for factor in recalkv.layers[i].factor_shapes(geometry):
                reader.read(i, factor)
    itemsize = config.model_config.dtype.itemsize
    served = replace(recalkv, latent_quantization=form)
    sizes = kv_bytes_per_token(served, geometry, itemsize)
    logger.info(
        "recalkv: method %s, %d KV-cache bytes per token instead of %d (%.1f %% removed)",
        recalkv.method,
        sizes["compressed"],
        sizes["dense"],
        100 * (1 - sizes["compressed"] / sizes["dense"]),
    )
    if form != recalkv.latent_quantization:
        plain = kv_bytes_per_token(recalkv, geometry, itemsize)["compressed"]
        logger.info(
            "recalkv: --kv-cache-dtype %s: latents are cached as e4m3 numbers with a scale per %d, "
            "which holds %.2f times the tokens of %s latents",
            config.cache_config.cache_dtype,
            form.group_size,
            plain / sizes["compressed"],
            str(config.model_config.dtype).removeprefix("torch."),
        )
