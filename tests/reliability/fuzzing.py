"""How long the fuzzers of this folder run: ``RECALKV_FUZZ_EXAMPLES`` per property.

Without it the same few examples every time, so that a commit's outcome does not depend on luck;
with it other ones in every run.
"""

from __future__ import annotations

import os

from hypothesis import settings

_EXAMPLES = os.environ.get("RECALKV_FUZZ_EXAMPLES")


def fuzzed(usual: int) -> settings:
    """Settings of a property that tries ``usual`` examples unless told otherwise."""
    return settings(
        max_examples=int(_EXAMPLES or usual),
        derandomize=_EXAMPLES is None,
        deadline=None,
    )
