"""The plot that ``recalkv eval --metric ppl --plot`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recalkv_vllm.compression.output.figure import new_figure, write_figure


def plot_positions(results: list[dict[str, Any]], path: Path) -> None:
    """Plot the negative log-likelihood against the position in a window, a line per dataset; with
    a base model, beside its own and the difference.

    Args:
        results: of every dataset, with ``positions``.
        path: of the plot; its suffix chooses the format.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    with_base = "base_nll" in results[0]
    figure = new_figure((9.5 if with_base else 5.5, 4))
    nll, *loss = figure.subplots(1, 2 if with_base else 1, squeeze=False)[0]
    for i, result in enumerate(results):
        rows, color = result["positions"], f"C{i}"
        ends = [row["end"] for row in rows]
        found = [row["nll"] for row in rows]
        nll.plot(ends, found, "o-", color=color, label=result["dataset"])
        if with_base:
            base = [row["base_nll"] for row in rows]
            nll.plot(ends, base, "--", color=color, label=f"{result['dataset']}, base")
            differences = [a - b for a, b in zip(found, base, strict=True)]
            loss[0].plot(ends, differences, "o-", color=color, label=result["dataset"])
    for axes, label in zip((nll, *loss), ("nll, nats per token", "loss, nats"), strict=False):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens before, up to")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    write_figure(figure, path)
