"""A file of answers, one JSON line each: an interrupted run goes on where it ended."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recalkv_vllm.compression.errors import InputError, output_errors


class AnswerFile:
    """Answers of one model and engine among those of a file.

    Args:
        path: of the file, which need not be there; None keeps nothing.
        model: the directory of the model, whose answers count only while its files are the same.
        engine: its name, and the dtype if one was asked for.

    Raises:
        InputError: the file has other content.
    """

    def __init__(self, path: Path | None, model: Path, engine: str):
        self._path = path
        self._made_by = {"model": str(model), "files": _digest(model), "engine": engine}
        self._known: dict[str, str] = {}
        if path is not None and path.exists():
            for row in _rows(path):
                if row.items() >= self._made_by.items():
                    self._known[row["prompt"]] = row["answer"]

    def find(self, prompt: list[int], answer_tokens: int) -> str | None:
        """The answer to a prompt, if it is known."""
        return self._known.get(_prompt_digest(prompt, answer_tokens))

    def add(self, prompt: list[int], answer_tokens: int, answer: str, **about: Any) -> None:
        """Append an answer; ``about`` is for people to read.

        Raises:
            OutputError: the file cannot be written.
        """
        digest = _prompt_digest(prompt, answer_tokens)
        self._known[digest] = answer
        if self._path is None:
            return
        row = {**self._made_by, "prompt": digest, **about, "tokens": len(prompt), "answer": answer}
        with output_errors(f"--answers {self._path}"), self._path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, which loses a last line that was cut off."""
    try:
        data = path.read_text(encoding="utf-8")
        whole = data[: data.rfind("\n") + 1]
        rows = [json.loads(line) for line in whole.splitlines()]
        if not all(isinstance(row, dict) and "answer" in row and "prompt" in row for row in rows):
            raise ValueError("a line is not an answer")
        if data and not rows:
            raise ValueError("no whole line")
    except (OSError, ValueError) as error:
        raise InputError(
            f"--answers {path}: expected the answers of an earlier run, or no such file ({error})"
        ) from error
    if whole != data:
        with output_errors(f"--answers {path}"):
            path.write_text(whole, encoding="utf-8")
    yield from rows


def _prompt_digest(prompt: list[int], answer_tokens: int) -> str:
    return hashlib.blake2b(repr((prompt, answer_tokens)).encode(), digest_size=16).hexdigest()


def _digest(model: Path) -> str:
    """Digest of a model's configuration, and of the sizes and times of its weights."""
    digest = hashlib.blake2b((model / "config.json").read_bytes(), digest_size=8)
    for file in sorted(model.glob("*.safetensors")):
        stat = file.stat()
        digest.update(repr((file.name, stat.st_size, stat.st_mtime_ns)).encode())
    return digest.hexdigest()
