"""A directory that is there whole or not at all: written beside its place, then renamed."""

from __future__ import annotations

import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recalkv_vllm.compression.errors import InputError, output_errors

log = logging.getLogger(__name__)


def check_absent(out: Path) -> None:
    """Raise :class:`InputError` if ``out`` exists or cannot be made."""
    if out.exists() or out.is_symlink():
        raise InputError(f"output {out}: exists already; expected a new path")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"output {out}: cannot be created in {parent}")


@contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """A new directory beside ``out`` that becomes ``out`` if the block succeeds, else vanishes.

    Raises:
        OutputError: it cannot be written.
    """
    parent, prefix = out.absolute().parent, f".{out.name}."
    with output_errors(f"output {out}"):
        parent.mkdir(parents=True, exist_ok=True)
        # What a killed run leaves cannot be told from what another one is writing.
        for other in parent.glob(glob.escape(prefix) + "?" * 8):
            log.warning("%s: of a run that was killed, or is still writing", other)
        partial = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            yield partial
            partial.chmod(0o755)  # mkdtemp makes it private
            check_absent(out)
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
