"""``recalkv eval`` with metrics that need text or a base model: options, runs and table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

#: Windows of text that the model writes, where ``--max-tokens`` does not say.
SELF_WINDOWS = 8


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which text is measured on."""
    add = parser.add_argument
    add(
        "--dataset",
        metavar="NAME|PATH",
        dest="datasets",
        action="append",
        help="ppl, agreement: a .txt, .jsonl or .parquet file; NAME[:CONFIG[:SPLIT]] of the "
        "datasets library; builtin (the Python language reference); builtin-source (source code "
        "of Python's standard library); or self (text that the base model writes); give it several "
        "times to measure on each",
    )
    add("--text-column", metavar="C", default="text", help="column of the dataset with the text")


def run_perplexity(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Perplexity on every dataset, and of ``--base`` if it is given."""
    from recalkv_vllm.cli.position_plot import plot_positions
    from recalkv_vllm.compression.base_model.find import find_model
    from recalkv_vllm.evaluation.engines import load_engine
    from recalkv_vllm.evaluation.perplexity import compare_losses, describe_losses, paired_error

    engine = load_engine(options.engine, options.dtype)
    models = [directory, *([find_model(options.base)] if options.base else [])]
    texts = _texts(options, directory)
    windows = [window for _, own in texts for window in own]
    losses = [engine.score_windows(model, windows) for model in models]
    results, begin = [], 0
    for name, own in texts:
        part = slice(begin, begin + len(own))
        begin += len(own)
        found, *base = (
            describe_losses(f"model {model}", of[part])
            for model, of in zip(models, losses, strict=True)
        )
        compared = found
        if base:
            compared = compare_losses(found, base[0])
            compared["loss_error"] = paired_error(*(of[part] for of in losses))
        results.append({"dataset": name, "seq_len": options.seq_len, **compared})
    if options.plot is not None:
        plot_positions(results, options.plot)
    return _joined(options, results)


def run_agreement(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Agreement with ``--base`` on every dataset."""
    from recalkv_vllm.compression.errors import InputError
    from recalkv_vllm.evaluation.agreement import agreement

    if options.engine != "transformers":
        raise InputError(
            f"--engine {options.engine}: expected transformers for --metric agreement, which "
            "compares whole distributions"
        )
    base = _base(options)
    results = [
        {"dataset": name, "seq_len": options.seq_len, **agreement(directory, base, windows)}
        for name, windows in _texts(options, directory)
    ]
    return _joined(options, results)


def run_divergence(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """How long greedy answers are those of ``--base``."""
    from recalkv_vllm.compression.base_model.model import BaseModel
    from recalkv_vllm.evaluation.divergence import divergence
    from recalkv_vllm.evaluation.engines import load_engine

    base = _base(options)
    engine = load_engine(options.engine, options.dtype)
    tokenizer = BaseModel(directory).tokenizer()
    return {"base": options.base, **divergence(engine, directory, base, tokenizer)}


def show_datasets(result: dict[str, Any]) -> None:
    """Print the perplexity on several datasets as a table."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['model']}: nll, nats per token", box=SIMPLE_HEAD, pad_edge=False)
    compared = ["base", "loss"] if "base" in result else []
    for column in ("dataset", "tokens", "model", *compared):
        table.add_column(column, justify="left" if column == "dataset" else "right")
    for row in result["datasets"]:
        base = [f"{row['base_nll']:.4f}", _loss(row)] if compared else []
        table.add_row(row["dataset"], f"{row['tokens']:,}", f"{row['nll']:.4f}", *base)
    Console().print(table)


def _loss(row: dict[str, Any]) -> str:
    """The loss, and its standard error."""
    error = row["loss_error"]
    return f"{row['loss']:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def _base(options: argparse.Namespace) -> Path:
    from recalkv_vllm.compression.base_model.find import find_model
    from recalkv_vllm.compression.errors import InputError

    if options.base is None:
        raise InputError(f"--base: expected a model for --metric {options.metric}, found none")
    return find_model(options.base)


def _joined(options: argparse.Namespace, results: list[dict[str, Any]]) -> dict[str, Any]:
    base = {"base": options.base} if options.base else {}
    return {**base, **(results[0] if len(results) == 1 else {"datasets": results})}


def _texts(options: argparse.Namespace, directory: Path) -> list[tuple[str, list[list[int]]]]:
    """The name of every dataset, and its windows."""
    from recalkv_vllm.compression.base_model.find import find_model
    from recalkv_vllm.compression.base_model.model import BaseModel
    from recalkv_vllm.compression.calibration.text import SELF, describe, documents
    from recalkv_vllm.compression.errors import InputError
    from recalkv_vllm.evaluation.perplexity import cut_windows, write_windows

    if not options.datasets:
        raise InputError(f"--dataset: expected a text for --metric {options.metric}, found none")
    for dataset in options.datasets:
        if options.datasets.count(dataset) > 1:
            raise InputError(f"--dataset {dataset}: found twice; expected each dataset once")
    tokenizer = BaseModel(directory).tokenizer()
    found = {
        dataset: cut_windows(
            documents(dataset, options.text_column),
            tokenizer,
            options.seq_len,
            options.max_tokens,
        )
        for dataset in options.datasets
        if dataset != SELF
    }
    # Last, as it takes minutes: a file that is missing shows before.
    if SELF in options.datasets:
        writer = find_model(options.base) if options.base else directory
        count = (options.max_tokens or SELF_WINDOWS * options.seq_len) // options.seq_len
        found[SELF] = write_windows(BaseModel(writer), max(1, count), options.seq_len, options.seed)
    return [(describe(dataset), found[dataset]) for dataset in options.datasets]
