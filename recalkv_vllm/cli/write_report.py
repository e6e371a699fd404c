"""``recalkv report``: a page of HTML about a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the sub-command's parser."""
    parser = commands.add_parser(
        "report",
        help="write a page about a checkpoint",
        description="Validate a compressed checkpoint and write one page of HTML about it that "
        "needs no network: what each layer stores, spectra, errors, losses, and how it was made.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", type=Path, help="checkpoint directory")
    add(
        "-o",
        "--out",
        metavar="FILE.html",
        type=Path,
        help="page to write (default: NAME-report.html, by the checkpoint's name)",
    )
    add(
        "--result",
        metavar="FILE.json",
        type=Path,
        action="append",
        default=[],
        help="what recalkv eval, bench or plan printed with --json, to show too; give it several "
        "times for several",
    )
    return parser


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the sub-command; the JSON object.

    Raises:
        InputError: a result that cannot be read, or a page that cannot be written.
        CheckpointError: not a checkpoint, or a damaged one.
    """
    import time

    from recalkv_vllm.compression.output.atomic_file import check_writable, write_whole
    from recalkv_vllm.report.page import render
    from recalkv_vllm.report.results import read_result

    began = time.monotonic()
    out = options.out or Path(f"{options.checkpoint.resolve().name}-report.html")
    check_writable(out)
    page = render(options.checkpoint, [read_result(path) for path in options.result])
    write_whole(out, page)
    return {
        "checkpoint": str(options.checkpoint),
        "report": str(out),
        "seconds": time.monotonic() - began,
    }


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    print(f"{result['checkpoint']}: report in {result['report']}")
