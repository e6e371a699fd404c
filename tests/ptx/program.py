"""PTX text to instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

#: Of an opcode, or operands.
Parts = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line.

    Args:
        guard: predicate that lanes must have, or None; ``negated``: must not have.
        parts: opcode, cut at its dots.
        scope: the braces that it stands in, for labels of inline assembly.
    """

    guard: str | None
    negated: bool
    parts: Parts
    operands: Parts
    scope: int
    text: str


@dataclass(slots=True)
class Program:
    """A kernel: its instructions, labels by scope and name, and parameters in order."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[tuple[int, str], int] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)

    def target(self, label: str, scope: int) -> int:
        """Where a branch in ``scope`` goes; the compiler's own labels are known everywhere."""
        return self.labels[0 if label.startswith("$") else scope, label]


def split_operands(text: str) -> Parts:
    """Cut at commas, but not inside of braces or brackets."""
    found, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0:
            found.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return (*found, last) if last else tuple(found)


def entries(text: str) -> dict[str, str]:
    """Kernels of a file of PTX, by name: from ``.entry`` to the end of the body."""
    starts = list(re.finditer(r"\.entry (\w+)\(", text))
    ends = [match.start() for match in starts[1:]] + [len(text)]
    return {
        match[1]: text[match.start() : text.rindex("\n}", match.start(), end) + 2]
        for match, end in zip(starts, ends, strict=True)
    }


def statements(body: str) -> Iterator[str]:
    """Labels with their colon, statements with their semicolon, and braces of scopes.

    Braces inside of a statement are those of a vector.
    """
    start, vector = 0, False
    for at, letter in enumerate(body):
        begun = body[start:at].strip()
        if letter in "{}" and (begun or vector):
            vector = letter == "{"
        elif (
            letter in "{}"
            or (letter == ";" and not vector)
            or (letter == ":" and re.fullmatch(r"[$\w]+", begun))
        ):
            yield body[start : at + 1].strip()
            start = at + 1


def parse(entry: str) -> Program:
    """The program of one kernel, as :func:`entries` gives it."""
    head, body = entry.split("\n{", 1)
    program = Program(parameters=re.findall(r"\b(\w+_param_\d+)\b", head))
    body = re.sub(r"//[^\n]*|^\s*\.(?:loc|file)\b[^\n]*", "", body, flags=re.MULTILINE)
    scopes, opened = [0], 0
    for statement in statements(body):
        if statement == "{":
            opened += 1
            scopes.append(opened)
        elif statement == "}":
            scopes.pop()
        elif statement.endswith(":"):
            scope = 0 if statement.startswith("$") else scopes[-1]
            program.labels[scope, statement[:-1]] = len(program.instructions)
        elif not statement.startswith("."):
            program.instructions.append(instruction(statement[:-1], scopes[-1]))
    return program


def instruction(statement: str, scope: int) -> Instruction:
    """Read one."""
    text = " ".join(statement.split())
    match = re.match(r"(?:@(!?)(%?\w+) )?([\w.:]+) ?(.*)$", text)
    assert match is not None, text
    negated, guard, name, operands = match.groups()
    parts = tuple(name.split("."))
    return Instruction(guard, negated == "!", parts, split_operands(operands), scope, text)
