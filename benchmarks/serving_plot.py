"""The pictures of ``recalkv bench serve``: throughput, inter-token latency, capacity."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from recalkv_vllm.compression.errors import InputError


def plot(result: dict[str, Any], directory: Path) -> None:
    """Write ``throughput.png``, ``capacity.png`` and, if contexts were measured, ``latency.png``.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise InputError("plots: matplotlib is not installed; pip install matplotlib") from error

    rows = result["rows"]
    loads = [row for row in rows if not row["workload"].startswith("context-")]
    names = list(dict.fromkeys(row["workload"] for row in loads))
    if names:
        figure = Figure(figsize=(4.5 * len(names), 4), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            of_workload = [row for row in loads if row["workload"] == name]
            for server, points in _series(of_workload, "concurrency", "output_throughput").items():
                _spread(axes, server, points)
            axes.set(title=name, xlabel="requests at a time", ylabel="output tokens per second")
            axes.set_ylim(bottom=0)
            axes.legend()
        figure.savefig(directory / "throughput.png")

    contexts = [row for row in rows if row["workload"].startswith("context-")]
    if contexts:
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for server, points in _series(contexts, "input_len", "itl_ms_p50").items():
            x = np.array([x for x, values in points.items() for _ in values])
            y = np.array([value for values in points.values() for value in values])
            label = server
            if len(points) > 1:
                slope, _ = np.polyfit(x, y, 1)
                label = f"{server}: {1000 * slope:.2f} ms per 1,000 tokens"
            _spread(axes, label, points)
        axes.set(xlabel="context, tokens", ylabel="inter-token latency, ms (median)")
        axes.set_ylim(bottom=0)
        axes.legend()
        figure.savefig(directory / "latency.png")

    tokens = {row["server"]: row["kv_cache_tokens"] for row in rows}
    figure = Figure(figsize=(6, 0.8 + 0.5 * len(tokens)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(tokens), list(tokens.values()))
    axes.bar_label(bars, [f"{count:,}" for count in tokens.values()], padding=3)
    axes.set_xlim(right=1.2 * max(tokens.values()))
    axes.invert_yaxis()
    axes.set_xlabel(f"tokens in {result['kv_cache_memory_bytes'] / 2**20:.0f} MiB of KV cache")
    figure.savefig(directory / "capacity.png")


def _series(rows: list[dict[str, Any]], x: str, y: str) -> dict[str, dict[float, list[float]]]:
    """Values of ``y`` by server and ``x``, one per round."""
    series: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: row[x]):
        series[row["server"]][row[x]].append(row[y])
    return series


def _spread(axes: Any, label: str, points: dict[float, list[float]]) -> None:
    """A line through the means, with bars from least to most."""
    low, mean, high = (np.array([f(v) for v in points.values()]) for f in (min, np.mean, max))
    axes.errorbar(list(points), mean, (mean - low, high - mean), fmt="o-", capsize=4, label=label)
    axes.set_xticks(list(points))
