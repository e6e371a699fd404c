"""Keeps the output of libraries off the terminal."""

from __future__ import annotations

import logging
import sys

log = logging.getLogger(__name__)


def quiet_libraries() -> None:
    """Log only errors of transformers and datasets; show progress bars only on a terminal, and not
    with ``--quiet``."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity_error()
    if not (sys.stderr.isatty() and log.isEnabledFor(logging.INFO)):
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
