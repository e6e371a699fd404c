"""The demonstration: a real model, stock and compressed, asked the same questions over HTTP.

``python -m recalkv_vllm.benchmarks.demo MODEL CHECKPOINT`` compresses ``MODEL`` into ``CHECKPOINT``
unless that is there, serves first one and then the other with the same KV-cache memory, and prints
answers and capacity side by side. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import torch
from rich.console import Console
from rich.table import Table

from recalkv_vllm.benchmarks.vllm_server import ServerError, VllmServer
from recalkv_vllm.checkpoint import (
    AttentionGeometry,
    RecalkvConfig,
    kv_bytes_per_token,
    read_hf_config,
)

QUESTIONS = [
    "What is the capital of France?",
    "What color is a clear sky during the day?",
    "Name three animals that live on a farm.",
]
MAX_TOKENS = 48
KV_CACHE_BYTES = 256 * 2**20
SERVE_ARGS = ["--max-model-len", "2048", "--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]


def serve_args() -> list[str]:
    """Server options for this machine's hardware."""
    if torch.cuda.is_available():
        return SERVE_ARGS
    # Compilation only adds start-up time on CPU. In bf16 the model's first token is a near-tie
    # between two languages, so that a comparison of answers needs float32.
    return [*SERVE_ARGS, "--enforce-eager", "--dtype", "float32"]


def ask(server: VllmServer) -> list[str]:
    """Greedy answers to the fixed questions over the OpenAI chat API."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    answers = []
    for question in QUESTIONS:
        completion = client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": question}],
            max_completion_tokens=MAX_TOKENS,
            temperature=0,
        )
        answers.append((completion.choices[0].message.content or "").strip())
    return answers


def compress(model: Path, checkpoint: Path, options: list[str]) -> None:
    """Run ``recalkv compress`` unless ``checkpoint`` is there."""
    if checkpoint.exists():
        print(f"{checkpoint}: already compressed", file=sys.stderr)
        return
    recalkv = Path(sys.executable).with_name("recalkv")
    # Its report goes to stderr with the rest of the progress: stdout ends with our JSON object.
    subprocess.run([recalkv, "compress", model, "-o", checkpoint, *options], stdout=2, check=True)


def run(model: Path, checkpoint: Path) -> dict[str, Any]:
    """Serve both models one after the other; returns the demonstration's JSON object."""
    hf_config = read_hf_config(checkpoint)
    itemsize = 2 if torch.cuda.is_available() else 4
    sizes = kv_bytes_per_token(
        RecalkvConfig.from_hf_config(hf_config),
        AttentionGeometry.from_hf_config(hf_config),
        itemsize,
    )
    answers, tokens = {}, {}
    servers = {
        "stock": (model, serve_args()),
        "compressed": (checkpoint, [*serve_args(), "--attention-backend", "recalkv"]),
    }
    for name, (path, args) in servers.items():
        log = checkpoint.parent / f"demo-{name}.log"
        print(f"starting: vllm serve {path} {' '.join(args)}  (log: {log})", file=sys.stderr)
        with VllmServer(path, args, log) as server:
            tokens[name] = server.kv_cache_tokens()
            answers[name] = ask(server)
    return {
        "answers": answers,
        "kv_bytes_per_token": {"stock": sizes["dense"], "compressed": sizes["compressed"]},
        "kv_cache_tokens": tokens,
    }


def show(result: dict[str, Any]) -> None:
    """Print the comparison as a table."""
    table = Table(show_lines=True)
    for column in ("", "stock vLLM", "compressed, --attention-backend recalkv"):
        table.add_column(column)
    for question, *pair in zip(
        QUESTIONS, result["answers"]["stock"], result["answers"]["compressed"], strict=True
    ):
        table.add_row(question, *pair)
    for label, key in (
        ("KV-cache bytes per token", "kv_bytes_per_token"),
        (f"tokens in a KV cache of {KV_CACHE_BYTES >> 20} MiB", "kv_cache_tokens"),
    ):
        table.add_row(label, *(f"{result[key][name]:,}" for name in ("stock", "compressed")))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main() -> None:
    """Command line of the demonstration; options after ``--`` go to ``recalkv compress``."""
    parser = argparse.ArgumentParser(description="Serve a model stock and compressed, and compare.")
    parser.add_argument("model", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("options", nargs="*", help="options of recalkv compress, after --")
    args = parser.parse_args()
    try:
        compress(args.model, args.checkpoint, args.options)
        result = run(args.model, args.checkpoint)
    except ServerError as error:
        sys.exit(f"demo: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    show(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
