"""The heat map that ``recalkv eval --metric ruler --plot`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recalkv_vllm.compression.output.figure import new_figure, write_figure

NAMES = {"base_score": "base", "score": "model"}


def plot_depths(result: dict[str, Any], path: Path) -> None:
    """Plot scores by depth of the needle and length: a column for each task, a row for each model.

    Args:
        result: as ``recalkv eval --metric ruler --json`` prints it, with a task that has a depth.
        path: of the plot; its suffix chooses the format.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    cells = result["cells"]
    tasks, lengths, depths = (
        list(dict.fromkeys(cell[name] for cell in cells)) for name in ("task", "length", "depth")
    )
    names = {name: label for name, label in NAMES.items() if name in cells[0]}
    figure = new_figure((1.2 + 1.9 * len(tasks), 0.9 + 2.2 * len(names)))
    grid = figure.subplots(len(names), len(tasks), squeeze=False, sharex=True, sharey=True)
    found = {(cell["task"], cell["length"], cell["depth"]): cell for cell in cells}
    for row, (name, label) in zip(grid, names.items(), strict=True):
        for axes, task in zip(row, tasks, strict=True):
            values = [[found[task, n, d][name] for n in lengths] for d in depths]
            image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for y, line in enumerate(values):
                for x, value in enumerate(line):
                    style = {"ha": "center", "va": "center", "fontsize": 8}
                    # Black on yellow, white on blue.
                    color = "black" if value > 0.6 else "white"
                    axes.text(x, y, f"{value:.0%}", color=color, **style)
            axes.set_title(f"{task}, {label}", fontsize=9)
            axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=8)
            axes.set_yticks(range(len(depths)), [f"{d:g}" for d in depths], fontsize=8)
    figure.colorbar(image, ax=grid, label="references found", shrink=0.8)
    figure.supxlabel("tokens", fontsize=9)
    figure.supylabel("depth of the needle", fontsize=9)
    write_figure(figure, path)
