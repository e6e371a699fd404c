"""``recalkv bench serve``: stock and compressed servers under the same load."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from recalkv_vllm.cli.help import HelpFormatter
from recalkv_vllm.cli.sizes import size


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the sub-command's parser."""
    parser = commands.add_parser(
        "serve",
        help="measure servers under load",
        description="Serve the stock model and compressed checkpoints, in turn and with equally "
        "large KV caches, load each server with 'vllm bench serve', and compare.",
        formatter_class=HelpFormatter,
    )
    add_systems(parser)
    add = parser.add_argument
    add(
        "--workload",
        nargs="+",
        default=["chat", "long"],
        metavar="NAME",
        help="kinds of requests to send, or all",
    )
    add(
        "--concurrency",
        nargs="+",
        type=int,
        default=[1, 16],
        metavar="N",
        help="concurrent requests",
    )
    add(
        "--prompts",
        type=int,
        default=2,
        metavar="N",
        help="total requests, as a multiple of the concurrency",
    )
    add(
        "-o",
        "--out",
        metavar="OUT",
        type=Path,
        default=Path("bench-serve"),
        help="directory for results, plots and logs",
    )
    return parser


def add_systems(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose what to compare, and how often."""
    add = parser.add_argument
    add("checkpoint", nargs="+", type=Path, metavar="CHECKPOINT", help="compressed checkpoints")
    add("--base", metavar="MODEL", help="stock model (default: as the checkpoint records)")
    add(
        "--kv-cache-memory-bytes",
        type=size,
        default="1GiB",
        metavar="SIZE",
        help="KV-cache size of every engine",
    )
    add("--rounds", type=int, default=2, metavar="N", help="how often each engine gets its turn")
    add("--max-model-len", type=int, default=2048, metavar="N", help="as in vLLM")
    add("--dtype", default="auto", help="as in vLLM")
    add("--seed", type=int, default=0, metavar="N", help="random seed of the prompts")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the sub-command; the JSON object."""
    from recalkv_vllm.benchmarks import serving

    return serving.run(options)


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    from recalkv_vllm.benchmarks import serving

    serving.show(result)
