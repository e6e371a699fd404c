"""``recalkv bench kernel``: our attention kernels against stock ones on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from recalkv_vllm.cli.help import HelpFormatter


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the sub-command's parser."""
    parser = commands.add_parser(
        "kernel",
        help="time the attention kernels",
        description="Time attention over latents against the stock kernel on a dense cache, "
        "alternately. Options that take several values are measured in every combination.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add(
        "--geometry",
        nargs="+",
        default=["llama-3.1-8b"],
        metavar="NAME",
        help="models such as smollm2-135m, or all",
    )
    add(
        "--compression",
        nargs="+",
        type=float,
        default=[0.5, 0.75],
        metavar="C",
        help="fraction of the KV cache removed",
    )
    add("--group-size", nargs="+", type=int, default=[1], metavar="S", help="KV heads per K group")
    add(
        "--spans",
        nargs="+",
        choices=("split", "shared-v", "joint", "nested"),
        default=["split"],
        help="how K and V groups share a latent; split: disjoint spans; shared-v: disjoint spans, "
        "and all heads read one V span; joint: K and V read the same span; nested: K reads the "
        "first columns of V's span",
    )
    add(
        "--latent-dtype",
        nargs="+",
        choices=("auto", "int8", "fp8", "int4", "int3", "bands"),
        default=["auto"],
        help="how latents are stored; auto: in --dtype; bands: columns of 8, 6, 4, 3 and 2 bits, "
        "4 on average",
    )
    add(
        "--context",
        nargs="+",
        type=int,
        default=[1024, 8192],
        metavar="N",
        help="cached tokens per sequence",
    )
    add("--batch", nargs="+", type=int, default=[1], metavar="B", help="sequences per batch")
    add("--queries", type=int, default=1, metavar="N", help="new tokens per sequence")
    add(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if available"
    )
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="dtype of queries, factors and unquantized caches",
    )
    add("--seconds", type=float, default=2.0, help="measuring time per combination")
    add("--reference", action="store_true", help="also time the torch reference (slow)")
    add(
        "--rows",
        type=Path,
        metavar="FILE.jsonl",
        help="write every row here as soon as it is measured; rows that are here are not measured "
        "again, so that an interrupted run goes on",
    )
    add("--plot", type=Path, metavar="FILE.png", help="plot the ratio against context length")
    return parser


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the sub-command; the JSON object."""
    from recalkv_vllm.benchmarks import kernel

    return kernel.run(options)


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    from recalkv_vllm.benchmarks import kernel_table

    kernel_table.show(result)
