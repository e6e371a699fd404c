"""Peers and checkpoints at equal stored bytes, on one model and one text.

``python -m recalkv_vllm.benchmarks.peers MODEL --calibrate TEXT --evaluate TEXT -o OUT`` writes
``OUT/result.json``, ``OUT/table.md`` and ``OUT/pareto.png``. Rows that ``OUT`` has already are not
measured again. Checkpoints are made by ``recalkv compress`` and stay in ``OUT``.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from recalkv_vllm.checkpoint import CheckpointError
from recalkv_vllm.compression.calibration.text import describe
from recalkv_vllm.compression.errors import InputError, check_least

from .catalog import ROWS, choose
from .measure import Bench
from .report import plot, table
from .served import add_served

#: What rows of one table have in common.
SETTINGS = ("num_samples", "calibrate_len", "evaluate_len", "max_tokens")


def main(arguments: list[str] | None = None) -> None:
    """Command line of the comparison."""
    parser = argparse.ArgumentParser(
        prog="python -m recalkv_vllm.benchmarks.peers", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("model", type=Path, help="base model")
    add("--calibrate", required=True, help="text to calibrate on")
    add("--evaluate", required=True, help="text to evaluate on; nothing is fitted to it")
    add("-o", "--out", type=Path, required=True, help="for checkpoints and results")
    add("--rows", nargs="+", metavar="ROW", help="these rows only, by their names in the table")
    add("--heal", action="store_true", help="ours healed, too (slow)")
    add("--served", action="store_true", help="checkpoints' losses as vLLM serves them, too")
    add("--num-samples", type=int, default=64)
    add("--calibrate-len", type=int, default=512, help="tokens of a calibration sample")
    add("--evaluate-len", type=int, default=1024, help="tokens of an evaluation window")
    add("--max-tokens", type=int, default=12 * 1024, help="of the evaluation text")
    options = parser.parse_args(arguments)
    try:
        run(options)
    except (InputError, CheckpointError) as error:
        parser.error(str(error))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


def run(options: argparse.Namespace) -> None:
    """Measure what is missing, and write everything.

    Raises:
        InputError: bad input, or likelihoods that are not finite.
        CheckpointError: no model, or one whose configuration is broken.
        subprocess.CalledProcessError: a checkpoint could not be made or evaluated.
    """
    check_least(options, num_samples=1, calibrate_len=2, evaluate_len=2, max_tokens=2)
    chosen = choose(options.rows, options.heal)
    settings = {
        "model": options.model.resolve().name,
        "calibrate": describe(options.calibrate),
        "evaluate": describe(options.evaluate),
        **{name: getattr(options, name) for name in SETTINGS},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {"settings": settings, "rows": []}
    for name, value in settings.items():
        if (found := result["settings"][name]) != value:
            raise InputError(
                f"{path}: its rows have {name} {found}, not {value}; choose another -o"
            )
    known = {row["name"] for row in result["rows"]}
    rows = [row for row in chosen if row.name not in known]
    bench = Bench(options, rows)
    if "dense" not in result:
        result |= {"dense_bytes": bench.dense_bytes(), "dense": bench.dense()}
        _write(path, result)
    for row in rows:
        print(f"peers: {row.name}", file=sys.stderr)
        began = time.monotonic()
        measured = bench.row(row)
        measured |= {
            "loss": measured["nll"] - result["dense"]["nll"],
            "seconds": round(time.monotonic() - began, 1),
        }
        about = {"name": row.name, "family": row.family, "storage_only": row.storage_only}
        result["rows"].append(about | measured)
        order = {name: i for i, name in enumerate(ROWS)}
        # Rows of names that are no more come last.
        result["rows"].sort(key=lambda row: order.get(row["name"], len(order)))
        _write(path, result)
    if options.served:
        add_served(result, chosen, options, functools.partial(_write, path, result))
    (options.out / "table.md").write_text(table(result))
    plot(result, options.out / "pareto.png")
    Console().print(table(result), markup=False, soft_wrap=True)


def _write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all: an interrupted run keeps the rows that it has."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(path)


if __name__ == "__main__":
    main()
