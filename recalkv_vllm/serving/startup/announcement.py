"""What a server says of the checkpoint that it serves: lines of the log, and gauges."""

from __future__ import annotations

import logging

from vllm.config import VllmConfig

from recalkv_vllm.checkpoint import kv_bytes_per_token
from recalkv_vllm.serving.latent_dtype import model_dtype
from recalkv_vllm.serving.startup.check import Served
from recalkv_vllm.serving.startup.metrics import publish

logger = logging.getLogger(__name__)


def announce(config: VllmConfig, served: Served) -> None:
    """Log what ``served`` takes per token, and publish it as metrics."""
    model = config.model_config
    dtype = model_dtype(model)
    sizes = kv_bytes_per_token(served.cached, served.geometry, dtype.itemsize)
    plan = f"recalkv plan {model.model} --max-model-len {model.max_model_len} --memory SIZE"
    told = f"; what a device holds is told by: {plan}"
    if served.geometry.decoder_layers is not None:
        told = " in the layers with attention"
    logger.info(
        "recalkv: method %s, %d KV-cache bytes per token instead of %d (%.1f %% removed)%s",
        served.stored.method,
        sizes["compressed"],
        sizes["dense"],
        100 * (1 - sizes["compressed"] / sizes["dense"]),
        told,
    )
    plain_dtype = str(dtype).removeprefix("torch.")
    latent_dtype = served.cached.latent_dtype or plain_dtype
    publish(str(model.served_model_name), served.stored, latent_dtype, sizes)
    latent_format = served.cached.latent_quantization
    if latent_format is not None and latent_format != served.stored.latent_quantization:
        plain = kv_bytes_per_token(served.stored, served.geometry, dtype.itemsize)["compressed"]
        logger.info(
            "recalkv: --kv-cache-dtype %s: latents are cached as e4m3 elements with a scale per "
            "%d, which holds %.2f times the tokens of %s latents",
            config.cache_config.cache_dtype,
            latent_format.group_size,
            plain / sizes["compressed"],
            plain_dtype,
        )
