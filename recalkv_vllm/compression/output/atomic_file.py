"""A file that is there whole or not at all: written beside its place, then renamed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from recalkv_vllm.compression.errors import OutputError, output_errors


def check_writable(path: Path) -> None:
    """Raise :class:`OutputError`, before the work that a file shows, if it cannot be written."""
    folder = path.absolute().parent
    if path.is_dir():
        raise OutputError(f"output {path}: cannot be written (a directory)")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"output {path}: cannot be written (no directory {folder} to write to)")


def write_whole(path: Path, text: str) -> None:
    """Write a file of UTF-8, in the place of one that is there.

    Raises:
        OutputError: it cannot be written.
    """
    with (
        output_errors(f"output {path}"),
        tempfile.TemporaryDirectory(dir=path.absolute().parent) as partial,
    ):
        written = Path(partial) / path.name
        written.write_text(text, encoding="utf-8")
        written.replace(path)
