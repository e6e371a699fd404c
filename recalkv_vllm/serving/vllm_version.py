"""Releases of vLLM that this plugin was tried with; whatever differs between them belongs here.

Between 0.32 and 0.33 nothing that the plugin calls differs.
"""

from __future__ import annotations

import re

#: Major and minor; ``pyproject.toml`` allows these.
TRIED = ((0, 32), (0, 33))


def untried(version: str) -> str | None:
    """A line that says so, if release ``version`` of vLLM is outside of those that were tried."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        return None
    release = int(found[1]), int(found[2])
    if TRIED[0] <= release <= TRIED[-1]:
        return None
    return (
        f"recalkv: vLLM {version} is {'older' if release < TRIED[0] else 'newer'} than what this "
        f"plugin was tried with, {tried_range()}; check its answers against the stock model's"
    )


def tried_range() -> str:
    """Oldest and newest release that were tried, for people."""
    return " to ".join(f"{major}.{minor}" for major, minor in (TRIED[0], TRIED[-1]))
