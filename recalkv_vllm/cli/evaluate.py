"""``recalkv eval``: accuracy of a base model or a compressed checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recalkv_vllm.cli.evaluate_ruler import add_ruler_options, run_ruler, show_ruler
from recalkv_vllm.cli.evaluate_text import (
    add_text_options,
    run_agreement,
    run_divergence,
    run_perplexity,
    show_datasets,
)
from recalkv_vllm.cli.help import HelpFormatter
from recalkv_vllm.names import ENGINES, WEIGHT_DTYPES


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the sub-command's parser."""
    parser = commands.add_parser(
        "eval",
        help="measure the accuracy of a model or checkpoint",
        description="Measure perplexity over consecutive windows of a text (ppl), agreement with "
        "the base model over such windows (agreement) or in answers to instructions (divergence), "
        "retrieval of a number hidden in a long "
        "text (passkey), or the synthetic tasks of RULER (ruler).",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL_OR_CHECKPOINT", help="directory, or a Hugging Face name owner/name")
    add_text_options(parser)
    add("--metric", choices=tuple(METRICS), default="ppl", help="what to measure")
    add(
        "--base",
        metavar="MODEL",
        help="the model to compare with; agreement and divergence need one",
    )
    add_ruler_options(parser)
    add(
        "--plot",
        metavar="FILE.png",
        type=Path,
        help="ppl: plot nll against position; ruler, passkey: scores by depth",
    )
    add("--seq-len", metavar="N", type=int, default=2048, help="tokens per window")
    add("--max-tokens", metavar="N", type=int, help="use at most N tokens of the text")
    add(
        "--engine",
        choices=ENGINES,
        default="transformers",
        help="transformers: dense weights in float32; vllm: latents, as they are served",
    )
    add(
        "--dtype",
        choices=("auto", *WEIGHT_DTYPES),
        help="vllm: dtype of weights, activations and caches; auto: the model's own (default: "
        "float32)",
    )
    add("--card", action="store_true", help="add the result to the checkpoint's model card")
    return parser


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the sub-command; the JSON object."""
    from recalkv_vllm.checkpoint import read_hf_config
    from recalkv_vllm.cli.libraries import quiet_libraries
    from recalkv_vllm.compression.base_model.find import find_model
    from recalkv_vllm.compression.errors import InputError, check_least
    from recalkv_vllm.compression.output.figure import check_plot
    from recalkv_vllm.compression.output.reader import check_factors
    from recalkv_vllm.evaluation.report import add_to_card, by_dataset, read_card

    quiet_libraries()
    check_least(options, seq_len=2, samples=1)
    if options.dtype is not None and options.engine != "vllm":
        raise InputError(f"--dtype {options.dtype}: expected --engine vllm, found {options.engine}")
    if options.max_tokens:
        check_least(options, max_tokens=2)
    if options.plot is not None:
        if options.metric not in PLOTTED:
            raise InputError(f"--plot: expected --metric {', '.join(PLOTTED)}")
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
        **({"dtype": options.dtype} if options.dtype else {}),
        **METRICS[options.metric](options, directory),
    }
    if options.card:
        for each in by_dataset(result):
            add_to_card(directory, each)
    return result


METRICS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "ppl": run_perplexity,
    "agreement": run_agreement,
    "divergence": run_divergence,
    "passkey": run_ruler,
    "ruler": run_ruler,
}
PLOTTED = ("ppl", "passkey", "ruler")


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    from recalkv_vllm.evaluation.report import by_dataset, describe_result

    if result["metric"] in ("passkey", "ruler"):
        show_ruler(result)
    elif result["metric"] == "ppl" and "datasets" in result:
        show_datasets(result)
    for each in by_dataset(result):
        what, found = describe_result(each)
        print(f"{result['model']}: {what}: {found}")
