"""``recalkv eval``: accuracy of a base model or a compressed checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recalkv_vllm.cli.evaluate_ruler import add_ruler_options, run_ruler, show_ruler
from recalkv_vllm.cli.help import HelpFormatter
from recalkv_vllm.names import ENGINES


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the sub-command's parser."""
    parser = commands.add_parser(
        "eval",
        help="measure the accuracy of a model or checkpoint",
        description="Measure perplexity over consecutive windows of a text (ppl), agreement with "
        "the base model over such windows (agreement), retrieval of a number hidden in a long "
        "text (passkey), or the synthetic tasks of RULER (ruler).",
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
    add("--base", metavar="MODEL", help="the model to compare with; agreement needs one")
    add_ruler_options(parser)
    add("--plot", metavar="FILE.png", type=Path, help="ruler, passkey: plot scores by depth")
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
    from recalkv_vllm.compression.output.figure import check_plot
    from recalkv_vllm.compression.output.reader import check_factors
    from recalkv_vllm.evaluation.report import add_to_card, read_card

    quiet_libraries()
    check_least(options, seq_len=2, samples=1)
    if options.max_tokens:
        check_least(options, max_tokens=2)
    if options.plot is not None:
        check_plot(options.plot)
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


METRICS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "ppl": _perplexity,
    "agreement": _agreement,
    "passkey": run_ruler,
    "ruler": run_ruler,
}


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    from recalkv_vllm.evaluation.report import describe_result

    if result["metric"] in ("passkey", "ruler"):
        show_ruler(result)
    what, found = describe_result(result)
    print(f"{result['model']}: {what}: {found}")
