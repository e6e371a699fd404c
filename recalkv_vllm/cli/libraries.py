"""Keeps the output of libraries off the terminal."""

from __future__ import annotations

import sys


def quiet_libraries() -> None:
    """Log only errors of transformers and datasets; show progress bars only on a terminal."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
