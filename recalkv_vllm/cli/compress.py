"""``recalkv compress``: make a compressed checkpoint."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from recalkv_vllm.names import (
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
        description="Factor a model's key and value projections and write a checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="model directory, or a hub name owner/name")
    add("-o", "--out", metavar="OUT", type=Path, required=True, help="directory to create")
    add(
        "--compression",
        metavar="C",
        type=float,
        required=True,
        help="fraction of the KV cache to remove, in [0, 1); 0 is full rank and exact",
    )
    add(
        "--method",
        default="kfac",
        help=f"{', '.join(METHOD_NAMES[:-1])} or {METHOD_NAMES[-1]}",
    )
    add(
        "--k-group-size",
        metavar="N",
        type=group_size,
        default="auto",
        help="KV heads per K group; auto: kfac's of the least expected loss within --target, "
        "the other methods' largest divisor of the KV heads up to 4",
    )
    add("--v-groups", metavar="N", type=int, help="V groups (default: the method's)")
    add(
        "--spans",
        choices=SPAN_KINDS,
        help="kfac: one latent for K and V of a group, of which K reads what --target pays for "
        "(nested, the default) or everything (joint), or a latent each (split)",
    )
    add(
        "--target",
        metavar="NAME|N",
        default="h100",
        help="kfac: most FLOP that rebuilding keys may cost per cached byte: that of h100, a100 "
        "or cpu, none, or a number",
    )
    add(
        "--output-refit",
        action=argparse.BooleanOptionalAction,
        help="kfac: refit o_proj to the dense model's attention output (default: unless the "
        "model's weights are quantised)",
    )
    add(
        "--rank-allocation",
        choices=RANK_ALLOCATIONS,
        help="how ranks are split over layers (default: the method's)",
    )
    add(
        "--latent-dtype",
        choices=LATENT_DTYPES,
        default="bf16",
        help="of the cached numbers; bf16: the factors' own; auto: kfac's choice of bits and ranks "
        "with the least expected loss",
    )
    add(
        "--dataset",
        metavar="NAME|PATH",
        default="builtin",
        help="calibration text: a .txt, .jsonl or .parquet file, a datasets name "
        "NAME[:CONFIG[:SPLIT]], builtin (the Python language reference; needs no network), or self "
        "(sampled from the model)",
    )
    add("--text-column", metavar="C", default="text", help="column of a table that holds the text")
    add("--num-samples", metavar="N", type=int, default=256, help="calibration samples")
    add("--seq-len", metavar="N", type=int, default=2048, help="tokens per sample")
    add("--seed", metavar="N", type=int, default=42, help="seed of the choice of samples")
    add(
        "--device",
        default="auto",
        help="where to calibrate; auto: a GPU if there is one; spread: layers on all GPUs, then in "
        "memory, then on disk, for a model that no GPU holds",
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
        help="write the factors alone, to be served on the untouched base model",
    )
    add(
        "--heal",
        metavar="STEPS",
        type=int,
        nargs="?",
        const=200,
        default=0,
        help="train factors, and q_proj and o_proj where weights may change, to predict as the "
        "dense model does; one sample a step (default: not at all; 200 steps if no number is "
        "given)",
    )
    return parser


def group_size(text: str) -> int | None:
    """``N``, or None for ``auto``."""
    return None if text == "auto" else int(text)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the sub-command; the JSON object."""
    from recalkv_vllm.cli.libraries import quiet_libraries
    from recalkv_vllm.compression.options import CompressOptions
    from recalkv_vllm.compression.pipeline import compress

    quiet_libraries()
    names = CompressOptions.__dataclass_fields__
    return {
        "out": str(options.out),
        **compress(CompressOptions(**{name: getattr(options, name) for name in names})),
        "serve": serve_command(options),
    }


def serve_command(options: argparse.Namespace) -> str:
    """How to serve what was written."""
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
    print(f"serve it: {result['serve']}")
