"""Where what was measured is kept for the next run."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """``$RECALKV_CACHE``, or ``recalkv`` in the user's cache."""
    if root := os.environ.get("RECALKV_CACHE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recalkv"
