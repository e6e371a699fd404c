"""Text by name: a local file, a ``datasets`` name, or what every Python installation carries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from recalkv_vllm.compression.calibration.builtin_text import builtin_documents, source_documents
from recalkv_vllm.compression.errors import InputError

BUILTIN = "builtin"
SOURCE = "builtin-source"
#: Text that the model writes.
SELF = "self"
#: Arbitrary strings, each stated twice.
RECALL = "recall"
#: File endings that are tables; every other file is plain text.
TABLE_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def documents(dataset: str, text_column: str = "text") -> Iterator[str]:
    """Yield the documents of a dataset, in order.

    Args:
        dataset: ``builtin`` or ``builtin-source``; a local ``.jsonl`` or ``.parquet`` table or any
            other file as plain text (one document); or a ``datasets`` hub name
            ``NAME[:CONFIG[:SPLIT]]`` (split ``train`` if not given), read as a stream.
        text_column: the column of a table that holds the text.

    Raises:
        InputError: no such file or dataset, an unreachable hub, or no such column.
    """
    if dataset == BUILTIN:
        return builtin_documents()
    if dataset == SOURCE:
        return source_documents()
    path = Path(dataset)
    if path.is_file():
        if path.suffix in TABLE_BUILDERS:
            return _table(path, TABLE_BUILDERS[path.suffix], text_column)
        return _plain_text(path)
    if path.is_dir():
        raise InputError(f"dataset {dataset}: is a directory; expected a file")
    if path.is_absolute() or dataset.startswith(".") or path.suffix in {".txt", *TABLE_BUILDERS}:
        raise InputError(f"dataset {dataset}: no such file")
    return _hub(dataset, text_column)


def describe(dataset: str) -> str:
    """Name of a dataset for provenance: a file is known by its name, not by its folder."""
    return Path(dataset).name if Path(dataset).is_file() else dataset


def _plain_text(path: Path) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"dataset {path}: expected UTF-8 text ({error})") from error


def _table(path: Path, builder: str, column: str) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True)
        yield from _column(rows, column, str(path))
    except InputError:
        raise
    except Exception as error:  # each file format fails with an exception class of its own
        raise InputError(f"dataset {path}: not a readable table ({_first_line(error)})") from error


def _hub(dataset: str, column: str) -> Iterator[str]:
    import datasets

    name, config, split = [*dataset.split(":"), "", ""][:3]
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        yield from _column(rows, column, dataset)
    except InputError:
        raise
    except Exception as error:  # the hub's client raises whatever its transport raises
        raise InputError(
            f"dataset {dataset}: no such file, and the hub gave no such dataset "
            f"({_first_line(error)}); name a local .txt, .jsonl or .parquet file, or {BUILTIN}"
        ) from error


def _column(rows, column: str, where: str) -> Iterator[str]:
    for row in rows:
        if column not in row:
            raise InputError(
                f"dataset {where}: no column {column!r}; found {', '.join(row)} "
                "(choose one with --text-column)"
            )
        if not isinstance(row[column], str):
            raise InputError(
                f"dataset {where}: column {column!r} holds {type(row[column]).__name__}; "
                "expected text"
            )
        yield row[column]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
