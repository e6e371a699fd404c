"""The plot that ``recalkv explore --plot`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recalkv_vllm.compression.output.figure import new_figure, write_figure

MARKERS = "osD^vPX"


def plot_front(result: dict[str, Any], path: Path) -> None:
    """Plot expected loss against what is removed and, for a target with a device, decode time.

    A line for each latent format and group size; points that none beats are filled.

    Args:
        result: as ``recalkv explore --json`` prints it.
        path: of the plot; its suffix chooses the format.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    rows = result["rows"]
    panels = {"removed": "KV cache removed, %"}
    if rows[0]["relative_decode_time"] is not None:
        panels["relative_decode_time"] = "predicted decode time of attention, % of dense"
    figure = new_figure(figsize=(5.5 * len(panels) + 1, 5.5))
    formats = list(dict.fromkeys(row["latent_dtype"] for row in rows))
    sizes = sorted({row["group_size"] for row in rows})
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, label) in zip(all_axes, panels.items(), strict=True):
        for latent_dtype in formats:
            for size in sizes:
                own = [
                    row
                    for row in rows
                    if (row["latent_dtype"], row["group_size"]) == (latent_dtype, size)
                ]
                style = {
                    "color": f"C{sizes.index(size)}",
                    "marker": MARKERS[formats.index(latent_dtype)],
                }
                x, y = ([100 * r[name] for r in own], [r["expected_loss"] for r in own])
                axes.plot(x, y, ":", linewidth=1, fillstyle="none", **style)
                front = [i for i, row in enumerate(own) if row["front"]]
                heads = "1 head" if size == 1 else f"{size} heads"
                axes.plot(
                    [x[i] for i in front],
                    [y[i] for i in front],
                    linestyle="none",
                    label=f"{latent_dtype}, {heads} per group",
                    **style,
                )
        axes.set_xlabel(label)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("expected loss, nats per token")
    # Percent of compression beside the points of the second panel: there it is not on an axis.
    for axes in all_axes[1:]:
        for row in filter(lambda row: row["front"], rows):
            axes.annotate(
                f"{row['removed']:.0%}",
                (100 * row["relative_decode_time"], row["expected_loss"]),
                xytext=(6, -3),
                textcoords="offset points",
                fontsize=8,
            )
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    name = Path(result["model"]).name
    figure.suptitle(f"{name}, --target {result['target']} (filled: on the front; hollow: beaten)")
    write_figure(figure, path)
