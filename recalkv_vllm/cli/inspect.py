"""``recalkv inspect``: what a compressed checkpoint contains."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the sub-command's parser."""
    parser = commands.add_parser(
        "inspect",
        help="show a checkpoint's ranks, size, errors and provenance",
        description="Validate a compressed checkpoint and show what it contains.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="checkpoint directory")
    parser.add_argument(
        "--plot", metavar="FILE.png", type=Path, help="plot ranks and errors by layer"
    )
    return parser


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the sub-command; the JSON object."""
    import time

    from recalkv_vllm.cli.plot import plot_layers
    from recalkv_vllm.compression.output.reader import check_factors
    from recalkv_vllm.compression.output.summary import summarize

    began = time.monotonic()
    recalkv, geometry, itemsize = check_factors(options.checkpoint)
    summary = summarize(recalkv, geometry, itemsize)
    if options.plot is not None:
        plot_layers(summary, options.plot)
    settings = {k: v for k, v in recalkv.settings.items() if k != "relative_error"}
    return {
        "checkpoint": str(options.checkpoint),
        **summary,
        "settings": settings,
        "calibration": recalkv.calibration,
        "tool_versions": recalkv.tool_versions,
        "seconds": time.monotonic() - began,
    }


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    from rich.console import Console
    from rich.table import Table

    size = result["kv_bytes_per_token"]
    table = Table(title=f"{result['checkpoint']}: {result['method']}")
    in_bands = any("bands" in layer for layer in result["layers"])
    headings = [
        "layer",
        "rank",
        *["columns × bits"] * in_bands,
        "K spans",
        "V spans",
        "K error",
        "V error",
    ]
    for heading in headings:
        table.add_column(heading, justify="right")
    for layer in result["layers"]:
        table.add_row(
            str(layer["layer"]),
            str(layer["rank"]),
            *([_bits(layer["bands"])] if in_bands else []),
            _spans(layer["k_spans"]),
            _spans(layer["v_spans"]),
            _number(layer["k_error"]),
            _number(layer["v_error"]),
        )
    console = Console()
    console.print(table)
    lines = {
        "KV cache": f"{size['compressed']} bytes per token, {size['dense']} dense "
        f"({result['compression']:.1%} removed, {result['compression_requested']:.1%} requested)",
        "latents": _pairs(result["latent_quantization"] or {})
        or "unquantized, in the dtype of the factors",
        "reconstruction": f"{result['reconstruct_flop_per_token']} FLOP per cached token",
        "errors": f"relative errors of the {result['error_of']}, recorded during compression",
        **{key.replace("_", " "): value for key, value in result["settings"].items()},
        "calibration": _pairs(result["calibration"]) or "none",
        "made with": _pairs(result["tool_versions"]),
    }
    for key, value in lines.items():
        console.print(f"{key}: {value}", highlight=False, markup=False, soft_wrap=True)


def _spans(spans: list[list[int]]) -> str:
    return " ".join(f"{start}:{end}" for start, end in spans)


def _bits(bands: list[list[int]]) -> str:
    """How many columns have how many bits each, most bits first."""
    columns = Counter[int]()
    for width, bits in bands:
        columns[bits] += width
    return " ".join(f"{columns[bits]}×{bits}" for bits in sorted(columns, reverse=True))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
