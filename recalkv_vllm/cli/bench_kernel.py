"""``recalkv bench kernel``: attention kernels against stock ones on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the sub-command's parser."""
    parser = commands.add_parser(
        "kernel",
        help="attention kernels",
        description="Time attention over latents and the stock kernel alternately. "
        "Options with several values are measured in all combinations.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--geometry", nargs="+", default=["llama-3.1-8b"], metavar="NAME", help="or: all")
    add("--compression", nargs="+", type=float, default=[0.5, 0.75], metavar="C", help="removed")
    add("--group-size", nargs="+", type=int, default=[1], metavar="S", help="KV heads per K group")
    add(
        "--spans",
        nargs="+",
        choices=("split", "shared-v", "joint"),
        default=["split"],
        help="of K and V; shared-v: split, all heads read one V span",
    )
    add(
        "--latent-dtype",
        nargs="+",
        choices=("auto", "int8", "fp8", "int4", "int3"),
        default=["auto"],
        help="of the cache; auto: that of --dtype",
    )
    add("--context", nargs="+", type=int, default=[1024, 8192], metavar="N", help="cached tokens")
    add("--batch", nargs="+", type=int, default=[1], metavar="B", help="sequences")
    add("--queries", type=int, default=1, metavar="N", help="new tokens per sequence")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of all")
    add("--seconds", type=float, default=2.0, help="time to measure each combination")
    add("--reference", action="store_true", help="also time the torch reference, which is slow")
    add("--plot", type=Path, metavar="FILE.png", help="draw the ratio against context")
    return parser


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the sub-command; the JSON object."""
    from recalkv_vllm.benchmarks import kernel

    return kernel.run(options)


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    from recalkv_vllm.benchmarks import kernel

    kernel.show(result)
