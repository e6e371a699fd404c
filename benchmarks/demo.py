"""The demonstration: a real model, stock and compressed, asked the same questions over HTTP.

``python -m recalkv_vllm.benchmarks.demo MODEL CHECKPOINT`` compresses ``MODEL`` into ``CHECKPOINT``
unless that is there, serves first one and then the other with the same KV-cache memory, and prints
answers and capacity side by side. The last line on stdout is one JSON object.

Greedy answers part at the first token where two candidates are near, and say little from there on.
So both models also read stock's answers, and it is counted where they would write the same token.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
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
    "What color is a clear sky during the day?",
    "What is photosynthesis?",
    "Write a Python function that adds two numbers.",
]
MAX_TOKENS = 48
ANSWERING = ("stock", "compressed")
KV_CACHE_BYTES = 256 * 2**20
SERVE_ARGS = ["--max-model-len", "2048", "--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]


def serve_args() -> list[str]:
    """Server options for this machine's hardware."""
    # Compilation only adds start-up time on CPU.
    return SERVE_ARGS if torch.cuda.is_available() else [*SERVE_ARGS, "--enforce-eager"]


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's ``text``, and token ids of what it read and wrote."""

    text: str
    prompt: list[int]
    written: list[int]


def ask(server: VllmServer) -> list[Answer]:
    """Greedy answers to the fixed questions over the OpenAI chat API."""
    client, answers = _client(server), []
    for question in QUESTIONS:
        completion = client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": question}],
            max_completion_tokens=MAX_TOKENS,
            temperature=0,
            extra_body={"return_token_ids": True},
        )
        choice = completion.choices[0]
        ids = completion.prompt_token_ids, choice.token_ids
        answers.append(Answer((choice.message.content or "").strip(), *ids))
    return answers


def agreement(server: VllmServer, answers: list[Answer]) -> float:
    """Share of the answers' tokens that the model would have written after what is before them."""
    client, first, total = _client(server), 0, 0
    for answer in answers:
        completion = client.completions.create(
            model=server.model,
            prompt=answer.prompt + answer.written,
            max_tokens=1,
            temperature=0,
            extra_body={"prompt_logprobs": 0},
        )
        read = completion.choices[0].prompt_logprobs[len(answer.prompt) :]
        for token, candidates in zip(answer.written, read, strict=True):
            first += candidates[str(token)]["rank"] == 1
            total += 1
    return first / total


def _client(server: VllmServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")


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
    sizes = kv_bytes_per_token(
        RecalkvConfig.from_hf_config(hf_config),
        AttentionGeometry.from_hf_config(hf_config),
        getattr(torch, hf_config["dtype"]).itemsize,
    )
    answers: dict[str, list[Answer]] = {}
    tokens, agreed = {}, {}
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
            agreed[name] = agreement(server, answers["stock"])
    return {
        "answers": {name: [answer.text for answer in given] for name, given in answers.items()},
        "agreement": agreed,
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
    label = "share of the tokens of stock's answers that it would have written too"
    table.add_row(label, *(f"{100 * result['agreement'][name]:.0f} %" for name in ANSWERING))
    for label, key in (
        ("KV-cache bytes per token", "kv_bytes_per_token"),
        (f"tokens in a KV cache of {KV_CACHE_BYTES >> 20} MiB", "kv_cache_tokens"),
    ):
        table.add_row(label, *(f"{result[key][name]:,}" for name in ANSWERING))
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
