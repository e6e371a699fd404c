"""Results of ``recalkv eval``, ``bench`` and ``plan`` (``--json``), as tables of the page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.evaluation.report import describe_result

SERVE_COLUMNS = (
    *("workload", "concurrency", "server", "round", "request_throughput", "output_throughput"),
    *("ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50", "itl_ms_p99", "preemptions", "peak_cache_use"),
)
OFFLINE_COLUMNS = ("system", "round", "requests_per_second", "tokens_per_second", "latency_s")


@dataclass(frozen=True, slots=True)
class Result:
    """What one file holds.

    Args:
        title: what was measured, and on what.
        found: in a sentence; may be empty.
        headings: of the table's columns.
        rows: its cells as text; may be empty.
    """

    title: str
    found: str
    headings: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = field(default_factory=list)


def read_result(path: Path) -> Result:
    """The result in a file.

    Raises:
        InputError: not a file that one of the commands printed.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--result {path}: not readable as JSON ({error})") from error
    for key, read in READERS.items():
        if isinstance(raw, dict) and key in raw:
            try:
                return read(raw)
            except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
                what = " ".join(f"{type(error).__name__}: {error}".split())
                raise InputError(f"--result {path}: not as recalkv prints it ({what})") from error
    raise InputError(
        f"--result {path}: expected what recalkv eval, bench or plan prints with --json, found "
        "something else"
    )


#: Where the base model's score is no measure.
TOO_LOW = "base too low to compare"


def _eval(raw: dict[str, Any]) -> Result:
    title, found = describe_result(raw)
    title = f"{Path(raw['model']).name}: {title}"
    if raw["metric"] not in ("passkey", "ruler"):
        return Result(title, found)
    columns = {"score": "found", "base_score": "by the base model", "retained": "retained"}
    columns = {name: heading for name, heading in columns.items() if name in raw["rows"][0]}
    rows = [
        [
            row["task"],
            f"{row['length']:,}",
            *(TOO_LOW if row[name] is None else f"{row[name]:.0%}" for name in columns),
        ]
        for row in raw["rows"]
    ]
    return Result(title, found, ["task", "tokens", *columns.values()], rows)


def _kernel(raw: dict[str, Any]) -> Result:
    from recalkv_vllm.benchmarks.kernel_table import COLUMNS

    columns = [(name, form) for name, form in COLUMNS if name in raw["rows"][0]]
    return Result(
        f"Attention kernels, {raw['dtype']}, {raw['device']}",
        f"{raw['rows'][0]['kernel']}; ratio: time of ours over stock's",
        [_heading(name) for name, _ in columns],
        [[form.format(row[name]) for name, form in columns] for row in raw["rows"]],
    )


def _bench(raw: dict[str, Any]) -> Result:
    served = "server" in raw["rows"][0]
    columns = SERVE_COLUMNS if served else OFFLINE_COLUMNS
    versions = ", ".join(f"{name} {version}" for name, version in raw["versions"].items())
    return Result(
        f"{'Servers under load' if served else 'Engines without a server'}, {raw['machine']}",
        f"{'partial; ' if raw['partial'] else ''}{raw['kv_cache_memory_bytes']:,} bytes of KV "
        f"cache each; {versions}",
        [_heading(name) for name in columns],
        [[_cell(row[name]) for name in columns] for row in raw["rows"]],
    )


def _plan(raw: dict[str, Any]) -> Result:
    kinds = list(raw["kv_cache_tokens"])
    names = {
        "weight_bytes": "bytes of weights",
        "kv_cache_bytes": "bytes of the KV cache",
        "bytes_per_token": "bytes per token",
        "kv_cache_tokens": "tokens that fit",
    }
    rows = [[name, *(f"{raw[key][kind]:,}" for kind in kinds)] for key, name in names.items()]
    requests = f"requests of {raw['max_model_len']:,} tokens"
    rows.append([requests, *(f"{raw['max_concurrency'][kind]:.2f}" for kind in kinds)])
    time = raw.get("relative_decode_time")
    speed = "" if time is None else f"; predicted decode time {time:.2f} of the dense cache's"
    return Result(
        f"What fits on a device, tensor parallel size {raw['tensor_parallel_size']}",
        f"target {raw['target']}{speed}",
        ["", *kinds],
        rows,
    )


#: By the key that tells what a file is.
READERS: dict[str, Callable[[dict[str, Any]], Result]] = {
    "metric": _eval,
    "roof": _kernel,
    "kv_cache_memory_bytes": _bench,
    "kv_cache_tokens": _plan,
}


def _heading(name: str) -> str:
    return name.replace("_", " ")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "–"
    return f"{value:,}" if isinstance(value, int) else str(value)
