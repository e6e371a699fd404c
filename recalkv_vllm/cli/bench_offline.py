"""``recalkv bench offline``: stock and compressed models without a server."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from recalkv_vllm.cli.bench_serve import add_systems
from recalkv_vllm.cli.help import HelpFormatter


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the sub-command's parser."""
    parser = commands.add_parser(
        "offline",
        help="measure throughput and latency without a server",
        description="Run 'vllm bench throughput' and 'vllm bench latency' on the stock model and "
        "on compressed checkpoints, in turn and with equally large KV caches, and compare.",
        formatter_class=HelpFormatter,
    )
    add_systems(parser)
    add = parser.add_argument
    add("--input-len", type=int, default=1024, metavar="N", help="prompt tokens per request")
    add("--output-len", type=int, default=64, metavar="N", help="generated tokens per request")
    add("--num-prompts", type=int, default=32, metavar="N", help="throughput: number of requests")
    add("--batch-size", type=int, default=4, metavar="N", help="latency: concurrent requests")
    add(
        "-o",
        "--out",
        metavar="OUT",
        type=Path,
        default=Path("bench-offline"),
        help="directory for results and logs",
    )
    return parser


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the sub-command; the JSON object."""
    from recalkv_vllm.benchmarks import offline

    return offline.run(options)


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    from recalkv_vllm.benchmarks import offline

    offline.show(result)
