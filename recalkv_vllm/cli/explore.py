"""``recalkv explore``: what compressions would cost and gain, to choose one from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from recalkv_vllm.cli.compress_command import compress_command
from recalkv_vllm.cli.help import HelpFormatter
from recalkv_vllm.cli.memory import add_memory_options
from recalkv_vllm.cli.shared_options import (
    add_calibration_options,
    add_target_option,
    compress_options,
)
from recalkv_vllm.names import LATENT_DTYPES

COMPRESSIONS = [0.5, 0.625, 0.75, 0.79, 0.86, 0.91]


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the sub-command's parser."""
    parser = commands.add_parser(
        "explore",
        help="show what compressions would cost and gain, to choose one from",
        description="Calibrate, and show for several compressions, group sizes and latent formats "
        "of method kfac the expected loss, the tokens that fit and the predicted decode time. No "
        "checkpoint is written; compress with the same text reuses the calibration.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="model directory, or a Hugging Face name owner/name")
    add(
        "--compression",
        metavar="C",
        type=float,
        nargs="+",
        default=COMPRESSIONS,
        help="fractions of the KV cache to remove",
    )
    add(
        "--latent-dtype",
        choices=[name for name in LATENT_DTYPES if name != "auto"],
        nargs="+",
        default=["bands", "bf16"],
        help="how latents may be stored; see recalkv compress --help",
    )
    add_target_option(parser)
    add_calibration_options(parser)
    add_memory_options(parser, required=False)
    add("--plot", metavar="FILE.png", type=Path, help="plot losses, and which ways are beaten")
    return parser


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the sub-command; the JSON object.

    Raises:
        InputError: bad input, or not enough memory for the weights.
    """
    import time

    from recalkv_vllm.cli.explore_plot import plot_front
    from recalkv_vllm.cli.explore_rows import cache_of, row_of
    from recalkv_vllm.cli.libraries import quiet_libraries
    from recalkv_vllm.compression.base_model.model import BaseModel
    from recalkv_vllm.compression.errors import check_least
    from recalkv_vllm.compression.explore import explore
    from recalkv_vllm.compression.output.figure import check_plot

    began = time.monotonic()
    check_least(options, block_size=1)
    if options.plot is not None:
        check_plot(options.plot)
    quiet_libraries()
    dense = cache_of(options, BaseModel.find(options.model))  # before work: weights may not fit
    others = {"out": Path(), "compression": None, "latent_dtype": "auto"}
    explored = explore(
        compress_options(options, **others), options.compression, options.latent_dtype
    )
    job = explored[0].job
    result = {
        "model": options.model,
        "target": str(job.target),
        "dense": dense,
        "rows": [row_of(options, each) for each in explored],
        "command": compress_command(
            job.options,
            {
                "out": "OUT",
                "compression": "REMOVED",
                "latent_dtype": "FORMAT",
                "k_group_size": "GROUP",
            },
        ),
        "seconds": time.monotonic() - began,
    }
    if options.plot is not None:
        plot_front(result, options.plot)
    return result


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    rows, dense = result["rows"], result["dense"]
    with_tokens = dense["tokens"] is not None
    table = Table(
        title=f"{result['model']}, --target {result['target']}",
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption="●: no other row is as good in bytes, loss and time, and better in one",
    )
    columns = ["", "removed", "format", "bits", "group", "loss", "bytes"]
    columns += ["tokens"] * with_tokens + ["time"]
    for column in columns:
        table.add_column(column, justify="left" if column == "format" else "right", no_wrap=True)
    for row in rows:
        time = row["relative_decode_time"]
        cells = [
            "●" if row["front"] else "",
            f"{row['removed']:.1%}",
            row["latent_dtype"],
            f"{row['bits']:.2f}",
            str(row["group_size"]),
            f"{row['expected_loss']:.4f}",
            f"{row['bytes_per_token']:,}",
        ]
        if with_tokens:
            cells.append(f"{row['tokens']:,}")
        cells.append("" if time is None else f"{time:.2f}")
        table.add_row(*cells, style=None if row["front"] else "dim")
    Console().print(table)
    fits = f" and {dense['tokens']:,} tokens" if with_tokens else ""
    print("loss: expected, in nats per token; time: predicted, of decoding attention")
    print(f"dense: {dense['bytes_per_token']:,} bytes per token{fits}, and a time of 1")
    print(f"to build a row (--json has the exact commands): {result['command']}")
