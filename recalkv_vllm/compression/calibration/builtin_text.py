"""Text that is there without a network: what every Python installation carries."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

#: Characters of source code from a module, so that the text is of many modules soon.
SOURCE_CHARACTERS = 4200


def builtin_documents() -> Iterator[str]:
    """Yield the language reference's topics: no source code, and no docstrings."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def source_documents() -> Iterator[str]:
    """Yield source code of the standard library's modules by name, from a third into each on."""
    folder = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names):
        path = folder / f"{name}.py"
        if not name.startswith("_") and path.is_file():
            source = path.read_text(encoding="utf-8")
            yield source[len(source) // 3 :][:SOURCE_CHARACTERS]
