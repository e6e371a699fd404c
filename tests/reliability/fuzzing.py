"""How long fuzzers run: ``RECALKV_FUZZ_EXAMPLES`` per property; ``tests/conftest`` draws them."""

from __future__ import annotations

import os

from hypothesis import settings


def fuzzed(usual: int) -> settings:
    """Settings of a property that tries ``usual`` examples unless told otherwise."""
    return settings(max_examples=int(os.environ.get("RECALKV_FUZZ_EXAMPLES", usual)))
