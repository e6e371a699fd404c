"""Stock vLLM and a compressed checkpoint, served with the same KV-cache bytes, under load.

``recalkv bench serve`` runs it. The servers take turns, ``rounds`` times; what differs between
rounds is the spread.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from typing import Any

from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.progress import Stage

from .load import measure
from .serving_plot import plot
from .systems import RESULT, engine_arguments, new_result, require_positive, systems, write
from .vllm_server import ServerError, VllmServer
from .workloads import WORKLOADS, Workload

log = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; the JSON object, which is also in ``OUT/result.json`` with the plots beside it.

    Raises:
        InputError: bad input, or a server that failed; rows measured until then are in
            ``OUT/result.json``, marked partial.
    """
    workloads = _workloads(options)
    contestants = systems(options)
    options.out.mkdir(parents=True, exist_ok=True)
    result = {**new_result(options), "num_prompts_per_concurrency": options.prompts}
    arguments = [*engine_arguments(options), "--max-num-seqs", str(max(options.concurrency))]
    loads = sum(len(_concurrencies(workload, options)) for workload in workloads)
    turns = [(number, name) for number in range(options.rounds) for name in contestants]
    try:
        with Stage("measuring", len(turns) * loads, bar=False) as stage:
            for number, name in turns:
                model, extra = contestants[name]
                path = options.out / f"{name}-{number}.log"
                log.info("serving %s (log: %s)", model, path)
                with VllmServer(model, [*arguments, *extra], path) as server:
                    for row in _measure_all(server, workloads, options, number):
                        result["rows"].append({"server": name, "round": number, **row})
                        write(options.out, result)
                        stage.step()
    except ServerError as error:
        what, *log_lines = str(error).splitlines()
        print("\n".join(log_lines), file=sys.stderr)
        write(options.out, result)
        raise InputError(
            f"{what.rstrip(':')} (see above); {len(result['rows'])} rows measured before that are "
            f"in {options.out / RESULT}, marked partial"
        ) from error
    result["partial"] = False
    write(options.out, result)
    plot(result, options.out)
    return result


def _workloads(options: argparse.Namespace) -> list[Workload]:
    names = options.workload
    if names == ["all"]:
        chosen = [w for w in WORKLOADS.values() if w.longest <= options.max_model_len]
    else:
        unknown = [name for name in names if name not in WORKLOADS]
        if unknown:
            raise InputError(
                f"--workload: expected all or some of {', '.join(WORKLOADS)}, found {unknown[0]!r}"
            )
        chosen = [WORKLOADS[name] for name in names]
    for workload in chosen:
        if workload.longest > options.max_model_len:
            raise InputError(
                f"--workload {workload.name}: needs {workload.longest} tokens per request, "
                f"more than --max-model-len {options.max_model_len}"
            )
    require_positive(concurrency=min(options.concurrency), rounds=options.rounds)
    return chosen


def _concurrencies(workload: Workload, options: argparse.Namespace) -> list[int]:
    return [1] if workload.alone else options.concurrency


def _measure_all(
    server: VllmServer, workloads: list[Workload], options: argparse.Namespace, number: int
) -> Iterator[dict[str, Any]]:
    tokens = server.kv_cache_tokens()
    for index, workload in enumerate(workloads):
        for concurrency in _concurrencies(workload, options):
            log.info("  %s, %d at a time", workload.name, concurrency)
            # The same prompts for every server, but none twice for one: prefixes are cached.
            seed = options.seed + 1000 * number + 100 * index + concurrency
            prompts = 4 if workload.alone else options.prompts * concurrency
            prompts = workload.num_prompts(prompts)
            yield {
                "workload": workload.name,
                "input_len": workload.input_len,
                "output_len": workload.output_len,
                "concurrency": concurrency,
                "kv_cache_tokens": tokens,
                **measure(server, workload, concurrency, prompts, seed),
            }


COLUMNS = ("workload", "concurrency", "server", "kv_cache_tokens", "request_throughput",
           "output_throughput", "ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50", "itl_ms_p99",
           "preemptions", "peak_cache_use")  # fmt: skip


def show(result: dict[str, Any]) -> None:
    """Print the result for people, rounds side by side."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in COLUMNS:
        table.add_column(column.replace("_", " "), justify="right")
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["workload"], row["concurrency"], row["server"]), []).append(row)
    for key in sorted(groups):
        rows = groups[key]
        cells = [" / ".join(f"{row[c]:.4g}" for row in rows) for c in COLUMNS[4:]]
        table.add_row(*map(str, key), f"{rows[0]['kv_cache_tokens']:,}", *cells)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
