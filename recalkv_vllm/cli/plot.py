"""The plot that ``recalkv inspect --plot`` writes, and how any plot is written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recalkv_vllm.compression.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(figsize: tuple[float, float]) -> Figure:
    """An empty figure of a size in inches.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise InputError("--plot: matplotlib is not installed; pip install matplotlib") from error
    return Figure(figsize=figsize, layout="constrained")


def check_plot(path: Path) -> None:
    """Raise :class:`InputError`, before the work that a plot shows, if it cannot be written."""
    known = new_figure((1, 1)).canvas.get_supported_filetypes()
    folder = path.absolute().parent
    if path.suffix.removeprefix(".") not in known:
        reason = f"expected a name that ends in .png or in {', '.join(sorted(known))}"
    elif path.is_dir():
        reason = "a directory"
    elif not folder.is_dir() or not os.access(folder, os.W_OK):
        reason = f"no directory {folder} to write to"
    else:
        return
    raise InputError(f"--plot {path}: cannot be written ({reason})")


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all; the suffix of ``path`` chooses the format.

    Raises:
        InputError: it cannot be written.
    """
    check_plot(path)
    try:
        with tempfile.TemporaryDirectory(dir=path.absolute().parent) as partial:
            written = Path(partial) / path.name
            figure.savefig(written)
            written.replace(path)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot {path}: cannot be written ({error})") from error


def plot_layers(summary: dict[str, Any], path: Path) -> None:
    """Plot cached elements per token and relative errors by layer.

    Args:
        summary: as :func:`recalkv_vllm.compression.output.summary.summarize` gives it.
        path: of the plot; its suffix chooses the format.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    layers = summary["layers"]
    index = [layer["layer"] for layer in layers]
    figure = new_figure(figsize=(9, 6))
    ranks, errors = figure.subplots(2, 1, sharex=True)
    # Spans may overlap: keys and values together read the whole rank.
    keys, values = ([_covered(layer[name]) for layer in layers] for name in ("k_spans", "v_spans"))
    ranks.step(index, [layer["rank"] for layer in layers], "k-", where="mid", label="rank")
    ranks.plot(index, keys, "o", label="read by keys")
    ranks.plot(index, values, "s", label="read by values")
    ranks.set_ylabel("elements per token")
    ranks.set_ylim(bottom=0)
    # Below the axes, where it covers no curve.
    ranks.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3)
    if summary["error_of"] is not None:
        errors.plot(index, [layer["k_error"] for layer in layers], "o-", label="keys")
        errors.plot(index, [layer["v_error"] for layer in layers], "s-", label="values")
        errors.legend()
    errors.set_ylabel(f"relative error of {summary['error_of']}")
    errors.set_xlabel("layer")
    figure.suptitle(f"{summary['method']}, {summary['compression']:.1%} of the KV cache removed")
    write_figure(figure, path)


def _covered(spans: list[list[int]]) -> int:
    """Columns in at least one span."""
    return len({n for start, end in spans for n in range(start, end)})
