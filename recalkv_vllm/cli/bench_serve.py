"""``recalkv bench serve``: stock and compressed servers under the same load."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from recalkv_vllm.cli.sizes import size


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the sub-command's parser."""
    parser = commands.add_parser(
        "serve",
        help="servers under load",
        description="Serve the stock model and compressed checkpoints in turn with the same "
        "KV-cache bytes, drive each with 'vllm bench serve', and compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_systems(parser)
    add = parser.add_argument
    add("--workload", nargs="+", default=["chat", "long"], metavar="NAME", help="or: all")
    add("--concurrency", nargs="+", type=int, default=[1, 16], metavar="N", help="requests at once")
    add("--prompts", type=int, default=2, metavar="N", help="requests per concurrent one")
    add("-o", "--out", type=Path, default=Path("bench-serve"), help="for result, plots and logs")
    return parser


def add_systems(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is compared, and how often."""
    add = parser.add_argument
    add("checkpoint", nargs="+", type=Path, metavar="CHECKPOINT", help="compressed checkpoints")
    add("--base", metavar="MODEL", help="stock model (default: what the checkpoint records)")
    add("--kv-cache-memory-bytes", type=size, default="1GiB", metavar="SIZE", help="of each system")
    add("--rounds", type=int, default=2, metavar="N", help="times that the systems take turns")
    add("--max-model-len", type=int, default=2048, metavar="N", help="of all systems")
    add("--dtype", default="auto", help="of all systems")
    add("--seed", type=int, default=0, help="of the prompts")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the sub-command; the JSON object."""
    from recalkv_vllm.benchmarks import serving

    return serving.run(options)


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    from recalkv_vllm.benchmarks import serving

    serving.show(result)
