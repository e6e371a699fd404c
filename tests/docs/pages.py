"""The Markdown pages of the project, and the shell commands in their fenced blocks."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")]
)
#: Fences of these languages, and those without one, are shell commands.
SHELL = {"", "sh", "bash"}
_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
#: What stands for a value in the pages, and a value for it.
PLACEHOLDERS = {"C": "0.5", "D": "0.5", "M": "kfac", "N": "8", "STEPS": "10"}
PLACEHOLDERS |= {"OPTIONS": "", "...": ""}


@dataclass(frozen=True)
class Command:
    """Words of one command, placeholders filled in, without variables before it."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def commands() -> list[Command]:
    """Every command of the pages, in order."""
    found = []
    for page in PAGES:
        for language, block in _FENCE.findall(page.read_text()):
            if language in SHELL and not _is_diagram(block):
                name = str(page.relative_to(ROOT))
                found += [Command(name, words) for words in _split(block)]
    return found


def _is_diagram(block: str) -> bool:
    return any(sign in block for sign in "─│►▼")


def _split(block: str) -> list[tuple[str, ...]]:
    """Commands of a block, which ``;``, ``&&`` and lines divide."""
    found, words = [], []
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&")
        lexer.whitespace_split = True
        for word in [*lexer, ";"]:
            if word in (";", "&&"):
                found.append(_cleaned(words))
                words = []
            else:
                words.append(word)
    return [words for words in found if words]


def _cleaned(words: list[str]) -> tuple[str, ...]:
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if any(word.startswith("[") for word in words):  # what may be left out
        words = [word.strip("[]") for word in words]
    if ">" in words:  # where its output goes
        words = words[: words.index(">")]
    words = [PLACEHOLDERS.get(word, word) for word in words]
    return tuple(word for word in words if word)
