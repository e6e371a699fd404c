"""Calibration text that is there without a network: what every Python installation carries."""

from __future__ import annotations

from collections.abc import Iterator


def builtin_documents() -> Iterator[str]:
    """Yield the language reference's topics: no source code, and no docstrings."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]
