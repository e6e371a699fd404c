"""Stock vLLM and compressed checkpoints without a server: throughput of many, latency of one batch.

``recalkv bench offline`` runs ``vllm bench throughput`` and ``vllm bench latency`` on each in turn,
with the same KV-cache bytes and the same seeded prompts, ``rounds`` times.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.progress import Stage

from .systems import RESULT, STOCK, engine_arguments, new_result, require_positive, systems, write

log = logging.getLogger(__name__)

#: Lines of a failed run that are shown.
LAST_LINES = 15
FIGURES = ("requests_per_second", "tokens_per_second", "latency_s")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; the JSON object, which is also in ``OUT/result.json``.

    Raises:
        InputError: bad input, or a run that failed; rows measured until then are in
            ``OUT/result.json``, marked partial.
    """
    require_positive(
        input_len=options.input_len,
        output_len=options.output_len,
        num_prompts=options.num_prompts,
        batch_size=options.batch_size,
        rounds=options.rounds,
    )
    if (longest := options.input_len + options.output_len) > options.max_model_len:
        raise InputError(
            f"--input-len and --output-len: {longest} tokens per request are more than "
            f"--max-model-len {options.max_model_len}"
        )
    contestants = systems(options)
    options.out.mkdir(parents=True, exist_ok=True)
    result = new_result(options)
    for name in ("input_len", "output_len", "num_prompts", "batch_size"):
        result[name] = getattr(options, name)
    runs = options.rounds * len(contestants) * len(("throughput", "latency"))
    with Stage("measuring", runs, bar=False) as stage:
        for number in range(options.rounds):
            for name, (model, extra) in contestants.items():
                log.info("round %d: %s", number, model)
                arguments = ["--model", model, *engine_arguments(options), *extra]
                path = options.out / f"{name}-{number}.log"
                row = {"system": name, "round": number}
                result["rows"].append(row | _measure(arguments, options, path, stage))
                write(options.out, result)
    result["partial"] = False
    write(options.out, result)
    return result


def _measure(
    arguments: list[str], options: argparse.Namespace, log_file: Path, stage: Stage
) -> dict[str, float]:
    length = ("--input-len", options.input_len, "--output-len", options.output_len)
    random = ("--dataset-name", "random", "--seed", options.seed)
    random += ("--random-input-len", options.input_len, "--random-output-len", options.output_len)
    throughput = _vllm_bench(
        "throughput", [*arguments, *random, "--num-prompts", options.num_prompts], log_file
    )
    stage.step()
    batch = ("--batch-size", options.batch_size, "--num-iters-warmup", 1, "--num-iters", 3)
    latency = _vllm_bench("latency", [*arguments, *length, *batch], log_file)
    stage.step()
    return {
        "requests_per_second": throughput["requests_per_second"],
        "tokens_per_second": throughput["tokens_per_second"],
        "latency_s": statistics.median(latency["latencies"]),
    }


def _vllm_bench(what: str, arguments: list[Any], log_file: Path) -> dict[str, Any]:
    """``vllm bench WHAT``; what it wrote. Its output is added to ``log_file``."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / RESULT
        vllm = Path(sys.executable).with_name("vllm")
        command = [vllm, "bench", what, *arguments, "--output-json", path]
        with log_file.open("ab") as out:
            done = subprocess.run(
                [*map(str, command)], stdout=out, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode or not path.is_file():
            lines = log_file.read_text(errors="replace").splitlines()[-LAST_LINES:]
            print("\n".join(lines), file=sys.stderr)
            raise InputError(
                f"vllm bench {what}: ended with status {done.returncode} (see above); rows "
                f"measured before that are in {log_file.parent / RESULT}, marked partial"
            )
        return json.loads(path.read_text())


def show(result: dict[str, Any]) -> None:
    """Print the result for people: rounds side by side, and medians against the stock model's."""
    from rich.console import Console
    from rich.table import Table

    rows: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        rows.setdefault(row["system"], []).append(row)
    table = Table(title=f"{result['input_len']} tokens in, {result['output_len']} out")
    table.add_column("system")
    for figure in FIGURES:
        table.add_column(figure.replace("_", " "), justify="right")
        table.add_column("of stock", justify="right")
    for name, measured in rows.items():
        cells = []
        for figure in FIGURES:
            median, stock = (
                statistics.median(row[figure] for row in some) for some in (measured, rows[STOCK])
            )
            cells.append(" / ".join(f"{row[figure]:.4g}" for row in measured))
            cells.append(f"{median / stock:.2f}")
        table.add_row(name, *cells)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
