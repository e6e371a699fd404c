"""Options that ``recalkv compress`` and ``recalkv explore`` have in common."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from recalkv_vllm.names import CPU_SAMPLES, DEFAULT_DATASETS, GPU_SAMPLES

if TYPE_CHECKING:
    from recalkv_vllm.compression.options import CompressOptions


def add_target_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--target``."""
    parser.add_argument(
        "--target",
        metavar="NAME[:LIMIT]",
        default="auto",
        help="kfac only: the device that will serve (h100, h200, a100, l40s, b200, cpu-amx or "
        "cpu; auto: the one at hand), for which predicted decode time is limited; LIMIT is a "
        "fraction of the dense cache's (default where 75%% is removed: of bands 1 on a GPU and "
        "1.03 on a CPU); none: the best accuracy at any speed",
    )


def add_calibration_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the calibration text, and where it runs."""
    add = parser.add_argument
    add(
        "--dataset",
        metavar="NAME|PATH",
        dest="datasets",
        action="append",
        help="calibration text: a .txt, .jsonl or .parquet file; NAME[:CONFIG[:SPLIT]] of the "
        "datasets library; builtin (the Python language reference, needs no network); self "
        "(text that the model writes); or recall (records of random strings, stated twice); give "
        f"it several times for a mix in equal shares (default: {', '.join(DEFAULT_DATASETS)})",
    )
    add("--text-column", metavar="C", default="text", help="column of the dataset with the text")
    add(
        "--num-samples",
        metavar="N",
        type=int,
        help=f"calibration samples ({_sizes('num_samples')})",
    )
    add("--seq-len", metavar="N", type=int, help=f"tokens per sample ({_sizes('seq_len')})")
    add("--seed", metavar="N", type=int, default=42, help="random seed for drawing samples")
    add(
        "--device",
        default="auto",
        help="where to calibrate; auto: a GPU if available; spread: layers on all GPUs, then in "
        "memory, then on disk, for models too large for one GPU",
    )


def compress_options(options: argparse.Namespace, **others: Any) -> CompressOptions:
    """The library's options; ``others`` are not taken from the command line, and what is in neither
    has its default."""
    from recalkv_vllm.compression.options import CompressOptions, default_samples

    names = CompressOptions.__dataclass_fields__
    given = {k: v for k, v in vars(options).items() if k in names} | others
    given["datasets"] = tuple(options.datasets or DEFAULT_DATASETS)
    return CompressOptions(
        **default_samples(options.device) | {k: v for k, v in given.items() if v is not None}
    )


def _sizes(name: str) -> str:
    """Default size of the calibration text, for help."""
    return f"default: {CPU_SAMPLES[name]} on a CPU, {GPU_SAMPLES[name]} on a GPU"
