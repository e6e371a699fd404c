"""How any plot is written: whole or not at all, and its file checked before the work it shows."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

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
