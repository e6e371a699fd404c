"""``recalkv eval``: perplexity of a base model or a compressed checkpoint."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the sub-command's parser."""
    parser = commands.add_parser(
        "eval",
        help="measure a model's accuracy",
        description="Perplexity over consecutive windows of a text.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL_OR_CHECKPOINT", help="directory, or a hub name owner/name")
    add(
        "--dataset",
        metavar="NAME|PATH",
        required=True,
        help="a .txt, .jsonl or .parquet file, a datasets name NAME[:CONFIG[:SPLIT]], or builtin",
    )
    add("--text-column", metavar="C", default="text", help="column of a table that holds the text")
    add("--metric", choices=("ppl",), default="ppl", help="what to measure")
    add("--seq-len", metavar="N", type=int, default=2048, help="tokens per window")
    add("--max-tokens", metavar="N", type=int, help="use no more than N tokens of the text")
    add(
        "--engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="transformers runs the dense products in float32; vllm runs the served latents",
    )
    return parser


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the sub-command; the JSON object."""
    from recalkv_vllm.checkpoint import read_hf_config
    from recalkv_vllm.cli.libraries import quiet_libraries
    from recalkv_vllm.compression.errors import InputError
    from recalkv_vllm.compression.reader import check_factors
    from recalkv_vllm.compression.source import find_model, load_tokenizer
    from recalkv_vllm.compression.text import describe, documents
    from recalkv_vllm.evaluation.perplexity import cut_windows, load_engine, perplexity

    quiet_libraries()
    for name, value in (("--seq-len", options.seq_len), ("--max-tokens", options.max_tokens)):
        if value is not None and value < 2:
            raise InputError(f"{name} {value}: expected at least 2")
    directory = find_model(options.model)
    if "recalkv" in read_hf_config(directory):
        check_factors(directory)
    engine = load_engine(options.engine)
    text = documents(options.dataset, options.text_column)
    windows = cut_windows(text, load_tokenizer(directory), options.seq_len, options.max_tokens)
    return {
        "model": options.model,
        "dataset": describe(options.dataset),
        "metric": options.metric,
        "engine": options.engine,
        "seq_len": options.seq_len,
        **perplexity(engine, directory, windows),
    }


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    print(
        f"{result['model']}: perplexity {result['perplexity']:.4f} (nll {result['nll']:.5f}) "
        f"over {result['tokens']} tokens of {result['dataset']}"
    )
