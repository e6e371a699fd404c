"""``recalkv compress``: make a compressed checkpoint."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from recalkv_vllm.cli.help import HelpFormatter
from recalkv_vllm.names import (
    CPU_SAMPLES,
    DEFAULT_DATASETS,
    GPU_SAMPLES,
    LATENT_DTYPES,
    METHOD_NAMES,
    RANK_ALLOCATIONS,
    SPAN_KINDS,
    WEIGHT_DTYPES,
)


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the sub-command's parser."""
    parser = commands.add_parser(
        "compress",
        help="compress a model's KV cache",
        description="Factor a model's key and value projections and write a checkpoint that caches "
        "low-rank latents instead of keys and values.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="model directory, or a Hugging Face name owner/name")
    add("-o", "--out", metavar="OUT", type=Path, required=True, help="directory to create")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--compression",
        metavar="C",
        type=float,
        help="fraction of the KV cache to remove, in [0, 1); 0 keeps full rank and is exact",
    )
    budget.add_argument(
        "--max-loss",
        metavar="NATS",
        type=float,
        help="remove as much as costs at most this much loss per token, measured on a part of the "
        "calibration text that is held out; tries about seven compressions",
    )
    add(
        "--method",
        default="kfac",
        help=f"how to factor: {', '.join(METHOD_NAMES[:-1])} or {METHOD_NAMES[-1]}",
    )
    add(
        "--k-group-size",
        metavar="N",
        type=group_size,
        default="auto",
        help="KV heads per K group; auto: for kfac, the size with the least expected loss within "
        "--target; for other methods, the largest divisor of the KV heads up to 4",
    )
    add("--v-groups", metavar="N", type=int, help="number of V groups (default: the method's own)")
    add(
        "--spans",
        choices=SPAN_KINDS,
        help="kfac only: what keys and values of a group read; nested: one latent, of which keys "
        "read as many columns as --target allows; joint: one latent, all of it; split: a latent "
        "each (default: nested)",
    )
    add(
        "--target",
        metavar="NAME|N",
        default="auto",
        help="kfac only: limit on the FLOP spent reconstructing keys per cached byte (of bands: "
        "per byte of half the dense cache): the limit of the device that will serve (h100, a100 "
        "or cpu; auto: the one at hand), a number, or none, for the best accuracy at any speed",
    )
    add(
        "--output-refit",
        action=argparse.BooleanOptionalAction,
        help="kfac only: refit o_proj to the dense model's attention output (default: if much is "
        "expected to be lost, and the model's weights are not quantized, nor only factors written)",
    )
    add(
        "--rank-allocation",
        choices=RANK_ALLOCATIONS,
        help="how to divide ranks among layers (default: the method's own)",
    )
    add(
        "--latent-dtype",
        choices=LATENT_DTYPES,
        default="auto",
        help="how to store latents; auto: kfac gives every column as many bits as it is worth "
        "(bands), other methods store bf16: unquantized, in the dtype of the factors",
    )
    add(
        "--dataset",
        metavar="NAME|PATH",
        dest="datasets",
        action="append",
        help="calibration text: a .txt, .jsonl or .parquet file; NAME[:CONFIG[:SPLIT]] of the "
        "datasets library; builtin (the Python language reference, needs no network); or self "
        "(text that the model writes); give it several times for a mix in equal shares (default: "
        f"{' and '.join(DEFAULT_DATASETS)})",
    )
    add("--text-column", metavar="C", default="text", help="column of the dataset with the text")
    add("--num-samples", metavar="N", type=int, help=f"calibration samples ({sizes(0)})")
    add("--seq-len", metavar="N", type=int, help=f"tokens per sample ({sizes(1)})")
    add("--seed", metavar="N", type=int, default=42, help="random seed for drawing samples")
    add(
        "--device",
        default="auto",
        help="where to calibrate; auto: a GPU if available; spread: layers on all GPUs, then in "
        "memory, then on disk, for models too large for one GPU",
    )
    add(
        "--dtype",
        choices=("auto", *WEIGHT_DTYPES),
        default="auto",
        help="dtype of the written weights and factors; auto: the model's own",
    )
    add(
        "--factors-only",
        action="store_true",
        help="write only the factors, to be served on top of the unmodified base model",
    )
    add(
        "--heal",
        metavar="STEPS",
        type=int,
        nargs="?",
        const=200,
        default=0,
        help="train factors, and q_proj and o_proj where weights may change, to predict as the "
        "dense model does; one sample a step; 200 steps if no number is given",
    )
    return parser


def sizes(index: int) -> str:
    """Default size of the calibration text, for help."""
    return f"default: {CPU_SAMPLES[index]} on a CPU, {GPU_SAMPLES[index]} on a GPU"


def group_size(text: str) -> int | None:
    """``N``, or None for ``auto``."""
    return None if text == "auto" else int(text)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the sub-command; the JSON object."""
    from recalkv_vllm.cli.libraries import quiet_libraries
    from recalkv_vllm.compression.base_model.devices import choose_device
    from recalkv_vllm.compression.options import CompressOptions
    from recalkv_vllm.compression.pipeline import compress

    quiet_libraries()
    on_cpu = choose_device(options.device).startswith("cpu")
    num_samples, seq_len = CPU_SAMPLES if on_cpu else GPU_SAMPLES
    given = {name: getattr(options, name) for name in CompressOptions.__dataclass_fields__}
    given["datasets"] = tuple(options.datasets or DEFAULT_DATASETS)
    given["num_samples"] = num_samples if options.num_samples is None else options.num_samples
    given["seq_len"] = seq_len if options.seq_len is None else options.seq_len
    return {
        "out": str(options.out),
        **compress(CompressOptions(**given)),
        "serve": serve_command(options),
    }


def serve_command(options: argparse.Namespace) -> str:
    """The command that serves what was written."""
    if not options.factors_only:
        return f"vllm serve {options.out} --attention-backend recalkv"
    config = json.loads((options.out / "config.json").read_text(encoding="utf-8"))
    factors = {"factors": str(options.out.absolute())}
    overrides = json.dumps({"architectures": config["architectures"], "recalkv": factors})
    return (
        f"vllm serve {options.model} --attention-backend recalkv "
        f"--hf-overrides {shlex.quote(overrides)}"
    )


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    size = result["kv_bytes_per_token"]
    print(
        f"{result['out']}: {size['compressed']} KV-cache bytes per token instead of "
        f"{size['dense']} ({result['compression']:.1%} removed), in {result['seconds']:.0f} s"
    )
    if "loss" in result:
        print(f"loss on held-out text: {result['loss']:.4f} nats per token")
    if result["target"] is not None:
        print(f"groups and spans are made for serving on: {result['target']} (--target)")
    print(f"serve it with: {result['serve']}")
