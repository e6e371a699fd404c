"""Low-rank KV-cache compression for vLLM (ReCalKV, arXiv 2505.24357)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from recalkv_vllm.version import __version__

__all__ = ["__version__", "compress", "register"]


def register() -> None:
    """Entry point ``vllm.general_plugins``: make vLLM know our backend and model classes.

    vLLM calls it in every process it starts, sometimes more than once.
    """
    from recalkv_vllm.serving.registration import register_plugin

    register_plugin()


def compress(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    compression: float | None = None,
    max_loss: float | None = None,
    dataset: str | Sequence[str] | None = None,
    target: str = "auto",
    latent_dtype: str = "auto",
    heal: int = 0,
    device: str = "auto",
    **others: Any,
) -> dict[str, Any]:
    """Compress a model's KV cache, as ``recalkv compress`` does.

    Progress goes to the logger ``recalkv_vllm`` at level INFO: none is shown unless that is on.

    Args:
        model: model directory, or a Hugging Face name ``owner/name``.
        out: directory to create; the checkpoint is there whole, or not at all.
        compression: fraction of the KV cache's bytes to remove, in [0, 1). It or ``max_loss``.
        max_loss: in nats per token of held-out text, above the dense model's.
        dataset: one or several calibration texts: a ``.txt``, ``.jsonl`` or ``.parquet`` file, a
            name for the ``datasets`` library, ``"builtin"``, ``"self"`` or ``"recall"``; None is
            the mix of the last three.
        target: device that will serve: ``"h100"``, ``"a100"``, ``"cpu-amx"``, ``"cpu"``, the one at
            hand (``"auto"``), or ``"none"`` for the best accuracy at any speed.
        latent_dtype: how latents are stored; ``"auto"`` is bands for ``kfac``.
        heal: steps of distillation from the dense model.
        device: where to calibrate.
        others: further fields of :class:`recalkv_vllm.compression.options.CompressOptions`, such as
            ``method``, ``num_samples`` and ``seq_len``; their defaults are those of the command.

    Returns:
        What ``recalkv compress --json`` prints, without ``serve``: among others ``out``,
        ``compression`` (reached, a fraction removed), ``kv_bytes_per_token`` (``dense`` and
        ``compressed``, over all layers), ``layers`` and ``seconds``.

    Raises:
        InputError: bad input; nothing is left at ``out``. A ``ValueError`` of one line, as is
        CheckpointError: an unusable ``config.json``.
    """
    from pathlib import Path

    from recalkv_vllm.compression import pipeline
    from recalkv_vllm.compression.options import CompressOptions, default_samples
    from recalkv_vllm.names import DEFAULT_DATASETS

    if unknown := sorted(set(others) - set(CompressOptions.__dataclass_fields__)):
        raise TypeError(f"compress() got an unexpected keyword argument {unknown[0]!r}")
    datasets = DEFAULT_DATASETS if dataset is None else dataset
    options = CompressOptions(
        model=os.fspath(model),
        out=Path(out),
        compression=compression,
        max_loss=max_loss,
        datasets=(datasets,) if isinstance(datasets, str) else tuple(datasets),
        target=target,
        latent_dtype=latent_dtype,
        heal=heal,
        device=device,
        **default_samples(device) | others,
    )
    return {"out": str(options.out), **pipeline.compress(options)}
