"""Releases of vLLM that this plugin was tried with; whatever differs between them belongs here.

Between 0.32 and 0.33 nothing that the plugin calls differs.
"""

from __future__ import annotations

import re

#: Major and minor; ``pyproject.toml`` allows these.
TRIED = ((0, 32), (0, 33))


def newer_than_tried(version: str) -> str | None:
    """A line that says so, if release ``version`` of vLLM is newer than all that were tried."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) <= TRIED[-1]:
        return None
    oldest, newest = (f"{major}.{minor}" for major, minor in (TRIED[0], TRIED[-1]))
    return (
        f"recalkv: vLLM {version} is newer than what this plugin was tried with, "
        f"{oldest} to {newest}; check its answers against the stock model's"
    )
