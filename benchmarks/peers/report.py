"""The comparison as tables and as a plot."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from recalkv_vllm.compression.output.figure import new_figure, write_figure

from .catalog import OURS, OWN
from .equal_bytes import best_peer, loss_at

#: Lines that lie on one another stay visible.
MARKERS = "osD^v<>PX*h"


def _peers(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["family"] not in OWN]


def _points(result: dict[str, Any], family: str) -> list[tuple[float, float]]:
    rows = (row for row in result["rows"] if row["family"] == family)
    return sorted((row["bytes_per_token"], row["loss"]) for row in rows)


def _ratio(ours: float, theirs: float) -> str:
    """Ours by theirs, where both cost something."""
    return f"{ours / theirs:.3f}" if ours > 0 and theirs > 0 else ""


def table(result: dict[str, Any]) -> str:
    """Markdown: every row, and ours in the same bytes; then ours, and the best peer in the same."""
    dense, ours = result["dense_bytes"], _points(result, OURS)
    served = any("served_loss" in row for row in result["rows"])
    columns = [
        *("row", "method", "removed", "bytes per token", "in a long context", "loss, nats"),
        *(["served by vLLM"] if served else []),
        *(f"{OURS} in the same bytes", f"{OURS} / row", f"{OURS} in those of a long context"),
    ]
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for row in result["rows"]:
        loss, sizes = row["loss"], (row["bytes_per_token"], row["long_context_bytes_per_token"])
        own = row["family"] in OWN
        same, long = (None if own else loss_at(ours, size) for size in sizes)
        cells = [""] * 3
        if same is not None:
            cells[:2] = f"{same:+.4f}", _ratio(same, loss)
        if long is not None:
            cells[2] = f"{long:+.4f}"
        if served:
            cells.insert(0, f"{row['served_loss']:+.4f}" if "served_loss" in row else "")
        family = row["family"] + (" (storage only)" if row["storage_only"] else "")
        lines.append(
            f"| {row['name']} | {family} | {1 - sizes[0] / dense:.1%} | {sizes[0]:,.0f} "
            f"| {sizes[1]:,.0f} | {loss:+.4f} | {' | '.join(cells)} |"
        )
    return "\n".join([*lines, "", *_best_peers(result)]) + "\n"


def _best_peers(result: dict[str, Any]) -> list[str]:
    lines = [
        "| removed | bytes per token | row | loss, nats | best peer in the same bytes "
        f"| its loss, nats | {OURS} / peer |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    peers = [row for row in _peers(result) if not row["storage_only"]]
    for row in result["rows"]:
        if row["family"] not in OWN:
            continue
        size, loss = row["bytes_per_token"], row["loss"]
        best = ("", "", "")
        if found := best_peer(peers, size):
            family, theirs = found
            wins = " (the peer wins)" if theirs < loss else ""
            best = (family, f"{theirs:+.4f}", _ratio(loss, theirs) + wins)
        elif peers:
            least = min(peers, key=lambda peer: peer["bytes_per_token"])
            name = f"none; {least['family']} in {least['bytes_per_token']:,.0f}"
            best = (name, f"{least['loss']:+.4f}", _ratio(loss, least["loss"]))
        lines.append(
            f"| {1 - size / result['dense_bytes']:.1%} | {size:,.0f} | {row['name']} "
            f"| {loss:+.4f} | {' | '.join(best)} |"
        )
    return lines


def plot(result: dict[str, Any], path: Path) -> None:
    """Bytes per token against loss, a line for each family.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    figure = new_figure(figsize=(9.5, 5.5))
    from matplotlib import color_sequences

    pairs = color_sequences["tab20"]  # dark and light in turn
    colors = iter(pairs[::2] + pairs[1::2])
    axes = figure.subplots()
    families = dict.fromkeys(row["family"] for row in result["rows"])
    markers = itertools.cycle(MARKERS)
    for family in families:
        stores = any(r["storage_only"] for r in result["rows"] if r["family"] == family)
        own = family in OWN
        axes.plot(
            *zip(*_points(result, family), strict=True),
            marker=next(markers),
            linestyle=":" if stores else "-" if own else "--",
            linewidth=2 if own else 1,
            color=str(0.3 * OWN.index(family)) if own else next(colors),
            label=family + (" (storage only)" if stores else ""),
        )
    axes.set_yscale("symlog", linthresh=0.01)  # what loses nothing may seem to gain a little
    axes.set_xscale("log")
    for ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        ticks("{x:,.0f}")
    axes.tick_params(axis="x", which="both", rotation=45)
    context = result["settings"]["evaluate_len"]
    axes.set(
        xlabel=f"KV-cache bytes per token, context of {context:,} (dense: "
        f"{result['dense_bytes']:,})",
        ylabel="loss against the dense model, nats per token",
    )
    axes.grid(which="both", alpha=0.3)
    figure.legend(loc="outside right upper")
    write_figure(figure, path)
