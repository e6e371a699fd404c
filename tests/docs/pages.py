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
    """Words of one command, placeholders filled in, without variables before it.

    Args:
        page: that shows it.
        words: of the command.
        output: the file that the page writes its output to, if any.
        synopsis: the page shows what may be left out of it.
    """

    page: str
    words: tuple[str, ...]
    output: str | None = None
    synopsis: bool = False

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def commands() -> list[Command]:
    """Every command of the pages, in order."""
    found = []
    for page in PAGES:
        for language, block in _FENCE.findall(page.read_text()):
            if language in SHELL and not _is_diagram(block):
                name = str(page.relative_to(ROOT))
                found += [_command(name, words) for words in _split(block)]
    return found


def _is_diagram(block: str) -> bool:
    return any(sign in block for sign in "─│►▼")


def _split(block: str) -> list[list[str]]:
    """Words of the commands of a block, which ``;``, ``&&`` and lines divide."""
    found, words = [], []
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&")
        lexer.whitespace_split = True
        for word in [*lexer, ";"]:
            if word in (";", "&&"):
                found.append(_without_variables(words))
                words = []
            else:
                words.append(word)
    return [words for words in found if words]


def _without_variables(words: list[str]) -> list[str]:
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


def _command(page: str, words: list[str]) -> Command:
    output = None
    synopsis = any(word.startswith("[") for word in words)
    if synopsis:
        words = [word.strip("[]") for word in words]
    if ">" in words:
        words, output = words[: words.index(">")], words[words.index(">") + 1]
    filled = (PLACEHOLDERS.get(word, word) for word in words)
    return Command(page, tuple(word for word in filled if word), output, synopsis)
