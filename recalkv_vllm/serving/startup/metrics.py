"""What an API server's ``/metrics`` says of compression.

Gauges of ``prometheus_client``, whose registry vLLM shows. Not a plugin of vLLM's statistics: any
makes vLLM 0.32 collect them under ``--disable-log-stats`` too, for every model.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Literal

from prometheus_client import Gauge

from recalkv_vllm.checkpoint import RecalkvConfig
from recalkv_vllm.version import __version__


@cache
def _gauges() -> tuple[Gauge, Gauge]:
    # Several API servers of one engine set the same: any of them will do.
    mode: Literal["mostrecent"] = "mostrecent"
    info = Gauge(
        "recalkv_info",
        "How the served model's KV cache is compressed; always 1.",
        ("model_name", "method", "compression", "latent_dtype", "version"),
        multiprocess_mode=mode,
    )
    size = Gauge(
        "recalkv_kv_cache_bytes_per_token",
        "KV-cache bytes per token over all layers, without tensor parallelism.",
        ("model_name", "cache"),
        multiprocess_mode=mode,
    )
    return info, size


def publish(
    model_name: str, served: RecalkvConfig, latent_dtype: str, sizes: Mapping[str, int]
) -> None:
    """Show one model's compression.

    Args:
        model_name: the label that vLLM's own metrics have.
        served: its configuration.
        latent_dtype: dtype of a latent's elements in the cache.
        sizes: bytes per token, ``dense`` and ``compressed``.
    """
    info, size = _gauges()
    info.labels(model_name, served.method, served.compression, latent_dtype, __version__).set(1)
    for name, count in sizes.items():
        size.labels(model_name, name).set(count)
