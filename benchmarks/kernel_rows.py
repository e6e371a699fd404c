"""Rows of the kernel benchmark on disk: one JSON line each, written as soon as it is measured.

A run that was interrupted goes on where it stopped, and what was measured before a fault is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recalkv_vllm.compression.errors import InputError


class RowFile:
    """Rows of earlier runs, and of this one.

    Args:
        path: JSON lines, made if it is not there; None keeps nothing.

    Raises:
        InputError: the file cannot be read, or has something else than rows in it.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.rows = [] if path is None else read_rows(path)

    def find(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row that was measured, or that failed, with these settings."""
        same = (row for row in self.rows if settings.items() <= row.items())
        return next(same, None)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row.

        Raises:
            InputError: the file cannot be written.
        """
        self.rows.append(row)
        if self.path is None:
            return
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise InputError(f"--rows: {self.path}: cannot be written ({error})") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file; none if it is not there. An unfinished last line is cut off.

    Raises:
        InputError: the file cannot be read, or has something else than rows in it.
    """
    if not path.exists():
        return []
    try:
        text = path.read_text()
        whole, _, unfinished = text.rpartition("\n")
        if unfinished:  # the run was killed while it wrote
            path.write_text(whole + "\n" if whole else "")
        return [json.loads(line) for line in whole.splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"--rows: {path}: cannot be read ({error})") from error
