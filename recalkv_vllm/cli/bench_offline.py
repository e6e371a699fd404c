"""``recalkv bench offline``: stock and compressed models without a server."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from recalkv_vllm.cli.bench_serve import add_systems


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the sub-command's parser."""
    parser = commands.add_parser(
        "offline",
        help="throughput and latency without a server",
        description="Run 'vllm bench throughput' and 'vllm bench latency' on the stock model and "
        "compressed checkpoints in turn with the same KV-cache bytes, and compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_systems(parser)
    add = parser.add_argument
    add("--input-len", type=int, default=1024, metavar="N", help="prompt tokens of a request")
    add("--output-len", type=int, default=64, metavar="N", help="generated tokens of a request")
    add("--num-prompts", type=int, default=32, metavar="N", help="requests, for throughput")
    add("--batch-size", type=int, default=4, metavar="N", help="requests at once, for latency")
    add("-o", "--out", type=Path, default=Path("bench-offline"), help="for result and logs")
    return parser


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the sub-command; the JSON object."""
    from recalkv_vllm.benchmarks import offline

    return offline.run(options)


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    from recalkv_vllm.benchmarks import offline

    offline.show(result)
