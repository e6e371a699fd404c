"""``recalkv eval``: accuracy of a base model or a compressed checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recalkv_vllm.cli.help import HelpFormatter
from recalkv_vllm.names import ENGINES


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the sub-command's parser."""
    parser = commands.add_parser(
        "eval",
        help="measure the accuracy of a model or checkpoint",
        description="Measure perplexity over consecutive windows of a text (ppl), agreement with "
        "the base model over such windows (agreement), or retrieval of a number hidden in a long "
        "text (passkey).",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL_OR_CHECKPOINT", help="directory, or a Hugging Face name owner/name")
    add(
        "--dataset",
        metavar="NAME|PATH",
        help="ppl, agreement: a .txt, .jsonl or .parquet file; NAME[:CONFIG[:SPLIT]] of the "
        "datasets library; or builtin (the Python language reference)",
    )
    add("--text-column", metavar="C", default="text", help="column of the dataset with the text")
    add("--metric", choices=tuple(METRICS), default="ppl", help="what to measure")
    add("--base", metavar="MODEL", help="agreement: the model to compare with")
    add(
        "--lengths",
        nargs="+",
        type=int,
        default=[512, 1024, 2048],
        metavar="N",
        help="passkey: prompt lengths in tokens",
    )
    add(
        "--depths",
        nargs="+",
        type=float,
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        metavar="D",
        help="passkey: where in the prompt the number is, from 0 (start) to 1 (end)",
    )
    add("--samples", type=int, default=2, metavar="N", help="passkey: prompts per length and depth")
    add("--seed", type=int, default=0, metavar="N", help="passkey: random seed")
    add("--seq-len", metavar="N", type=int, default=2048, help="tokens per window")
    add("--max-tokens", metavar="N", type=int, help="use at most N tokens of the text")
    add(
        "--engine",
        choices=ENGINES,
        default="transformers",
        help="transformers: dense weights in float32; vllm: latents, as they are served",
    )
    add("--card", action="store_true", help="add the result to the checkpoint's model card")
    return parser


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the sub-command; the JSON object."""
    from recalkv_vllm.checkpoint import read_hf_config
    from recalkv_vllm.cli.libraries import quiet_libraries
    from recalkv_vllm.compression.base_model.find import find_model
    from recalkv_vllm.compression.errors import check_least
    from recalkv_vllm.compression.output.reader import check_factors
    from recalkv_vllm.evaluation.report import add_to_card, read_card

    quiet_libraries()
    check_least(options, seq_len=2, samples=1)
    if options.max_tokens:
        check_least(options, max_tokens=2)
    directory = find_model(options.model)
    if "recalkv" in read_hf_config(directory):
        check_factors(directory)
    if options.card:
        # Fails before hours of measuring, also for a hub name: its cached copy is not ours to edit.
        read_card(Path(options.model))
    result = {
        "model": options.model,
        "metric": options.metric,
        "engine": options.engine,
        **METRICS[options.metric](options, directory),
    }
    if options.card:
        add_to_card(directory, result)
    return result


def _windows(
    options: argparse.Namespace, directory: Path
) -> tuple[dict[str, Any], list[list[int]]]:
    from recalkv_vllm.compression.base_model.model import BaseModel
    from recalkv_vllm.compression.calibration.text import describe, documents
    from recalkv_vllm.compression.errors import InputError
    from recalkv_vllm.evaluation.perplexity import cut_windows

    if options.dataset is None:
        raise InputError(f"--dataset: expected a text for --metric {options.metric}, found none")
    text = documents(options.dataset, options.text_column)
    windows = cut_windows(
        text, BaseModel(directory).tokenizer(), options.seq_len, options.max_tokens
    )
    return {"dataset": describe(options.dataset), "seq_len": options.seq_len}, windows


def _perplexity(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    from recalkv_vllm.evaluation.engines import load_engine
    from recalkv_vllm.evaluation.perplexity import perplexity

    engine = load_engine(options.engine)
    provenance, windows = _windows(options, directory)
    return {**provenance, **perplexity(engine, directory, windows)}


def _agreement(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    from recalkv_vllm.compression.base_model.find import find_model
    from recalkv_vllm.compression.errors import InputError
    from recalkv_vllm.evaluation.agreement import agreement

    if options.base is None:
        raise InputError("--base: expected the model to agree with, found none")
    if options.engine != "transformers":
        raise InputError(
            f"--engine {options.engine}: expected transformers for --metric agreement, which "
            "compares whole distributions"
        )
    provenance, windows = _windows(options, directory)
    base = find_model(options.base)
    return {"base": options.base, **provenance, **agreement(directory, base, windows)}


def _passkey(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    from recalkv_vllm.compression.base_model.model import BaseModel
    from recalkv_vllm.evaluation.engines import load_engine
    from recalkv_vllm.evaluation.passkey import passkey

    engine = load_engine(options.engine)
    tokenizer = BaseModel(directory).tokenizer()
    grid = (options.lengths, options.depths, options.samples, options.seed)
    return passkey(engine, directory, tokenizer, *grid)


METRICS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "ppl": _perplexity,
    "agreement": _agreement,
    "passkey": _passkey,
}


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    from recalkv_vllm.evaluation.report import describe_result

    if result["metric"] == "passkey":
        _show_grid(result)
    what, found = describe_result(result)
    print(f"{result['model']}: {what}: {found}")


def _show_grid(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    found = {(row["length"], row["depth"]): row["accuracy"] for row in result["rows"]}
    depths = sorted({depth for _, depth in found})
    table = Table(title=f"{result['model']}: pass keys found, by length and depth")
    for heading in ("tokens", *(f"{depth:g}" for depth in depths)):
        table.add_column(heading, justify="right")
    for length in sorted({length for length, _ in found}):
        table.add_row(f"{length:,}", *(f"{found[length, depth]:.0%}" for depth in depths))
    Console().print(table)
