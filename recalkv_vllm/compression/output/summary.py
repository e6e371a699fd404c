"""What a checkpoint's configuration says about size, cost and error."""

from __future__ import annotations

from typing import Any

from recalkv_vllm.checkpoint import (
    AttentionGeometry,
    CheckpointError,
    RecalkvConfig,
    compression_reached,
    kv_bytes_per_token,
)


def summarize(recalkv: RecalkvConfig, geometry: AttentionGeometry, itemsize: int) -> dict[str, Any]:
    """The summary that ``compress`` and ``inspect`` print.

    Args:
        recalkv: the checkpoint's configuration.
        geometry: of the model.
        itemsize: bytes of a cached element.

    Returns:
        ``method``, ``latent_quantization`` (``dtype`` and ``group_size``, or None; dtype ``bands``
        where layers have them),
        ``compression`` (reached) and ``compression_requested`` as fractions removed,
        ``kv_bytes_per_token`` over all layers, ``reconstruct_flop_per_token`` over all layers,
        ``error_of`` (``outputs`` or ``weights``: what the relative errors are of) and ``layers``.
    """
    latent_format = recalkv.latent_format(0)
    quantization = latent_format and {
        "dtype": latent_format.dtype,
        "group_size": latent_format.group_size,
    }
    error_of, k_errors, v_errors = _recorded_errors(recalkv)
    return {
        "method": recalkv.method,
        "compression": compression_reached(recalkv, geometry),
        "compression_requested": recalkv.compression,
        "latent_quantization": quantization,
        "kv_bytes_per_token": kv_bytes_per_token(recalkv, geometry, itemsize),
        "reconstruct_flop_per_token": sum(
            layout.reconstruct_flop(geometry) for layout in recalkv.layers
        ),
        "error_of": error_of,
        "layers": [
            {
                "layer": i,
                "rank": layout.rank,
                "k_width": layout.k_width,
                "v_width": layout.v_width,
                "k_spans": [list(span) for span in layout.k_spans],
                "v_spans": [list(span) for span in layout.v_spans],
                "head_order": list(layout.head_order),
                **({} if layout.bands is None else {"bands": [list(b) for b in layout.bands]}),
                "k_error": k_errors[i],
                "v_error": v_errors[i],
            }
            for i, layout in enumerate(recalkv.layers)
        ],
    }


def _recorded_errors(recalkv: RecalkvConfig) -> tuple[str | None, list, list]:
    """What the errors are of, and those of keys and values per layer; None where not recorded."""
    nothing = [None] * len(recalkv.layers)
    errors = recalkv.settings.get("relative_error")
    if errors is None:  # factors of another origin need not record any
        return None, nothing, nothing
    try:
        of, keys, values = errors["of"], errors["k"], errors["v"]
        numbers = [float(error) for error in (*keys, *values)]
    except (KeyError, TypeError, ValueError):
        numbers = []
    if len(numbers) != 2 * len(recalkv.layers) or len(keys) != len(values):
        raise CheckpointError(
            "config.json: recalkv.settings.relative_error: expected of, k and v with "
            f"{len(recalkv.layers)} numbers each"
        )
    return of, keys, values
