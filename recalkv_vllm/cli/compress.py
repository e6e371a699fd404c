"""``recalkv compress``: make a compressed checkpoint."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from recalkv_vllm.cli.help import HelpFormatter
from recalkv_vllm.cli.shared_options import (
    add_calibration_options,
    add_target_option,
    compress_options,
)
from recalkv_vllm.names import (
    LATENT_DTYPES,
    METHOD_NAMES,
    RANK_ALLOCATIONS,
    SPAN_KINDS,
    WEIGHT_DTYPES,
)

#: Nats per token.
LOSS_WORTH_TELLING = 0.005


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
    add_target_option(parser)
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
    add_calibration_options(parser)
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


def group_size(text: str) -> int | None:
    """``N``, or None for ``auto``."""
    return None if text == "auto" else int(text)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the sub-command; the JSON object."""
    from recalkv_vllm.cli.libraries import quiet_libraries
    from recalkv_vllm.compression.pipeline import compress

    quiet_libraries()
    made = compress(compress_options(options))
    return {"out": str(options.out), **made, "serve": serve_command(options)}


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
        loss, anywhere = result["expected_loss"], result["expected_loss_anywhere"]
        if anywhere is not None and loss - anywhere >= LOSS_WORTH_TELLING:
            print(
                f"attention in decoding takes {result['relative_decode_time']:.2f} of the dense "
                f"cache's time there, as predicted; without a limit of it (--target none), "
                f"{anywhere:.4f} instead of {loss:.4f} nats per token are expected to be lost"
            )
    print(f"serve it with: {result['serve']}")
