"""Records of arbitrary strings, and documents that state them and state them again.

What a model reads once and gives back to the letter (identifiers, numbers, names, addresses) is
rare in prose, where meaning carries a reader over what a cache has lost.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

CONSONANTS, VOWELS = "bcdfghjklmnprstvz", "aeiou"
SEPARATORS = (" = ", ": ", " -> ", "\t", " | ")
UUID_DIGITS = (8, 4, 4, 4, 12)
#: Share of documents whose values are all of one kind.
ONE_KIND = 0.7


@dataclass(frozen=True, slots=True)
class Document:
    """Strings as they are stated, what is asked for, and how they are stated again."""

    statement: str
    request: str
    restatement: str


def draw_document(rng: Random, most_records: int) -> Document:
    """A document of up to so many records (at least 4)."""
    return rng.choice(FORMS)(rng, rng.randint(3, most_records))


def _text(rng: Random, alphabet: str, lengths: tuple[int, ...]) -> str:
    return "".join(rng.choices(alphabet, k=rng.choice(lengths)))


def _uuid(rng: Random) -> str:
    return "-".join(_text(rng, string.hexdigits[:16], (length,)) for length in UUID_DIGITS)


def _hexadecimal(rng: Random) -> str:
    return _text(rng, string.hexdigits[:16], (8, 32))


def _number(rng: Random) -> str:
    return _text(rng, string.digits, (3, 4, 5, 7, 9, 12))


def _token(rng: Random) -> str:
    return _text(rng, string.ascii_letters + string.digits, (6, 8, 12, 20))


def _part(rng: Random) -> str:
    letters = string.ascii_uppercase
    return f"{_text(rng, letters, (2,))}-{_text(rng, string.digits, (4,))}-{rng.choice(letters)}"


def _word(rng: Random) -> str:
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.choice((2, 3))))


def _words(rng: Random) -> str:
    return " ".join(_word(rng) for _ in range(rng.choice((2, 3, 4))))


def _mail(rng: Random) -> str:
    return f"{_word(rng)}.{_word(rng)}@{_word(rng)}.{rng.choice(('org', 'net', 'io'))}"


def _ip(rng: Random) -> str:
    return ".".join(str(rng.randrange(256)) for _ in range(4))


def _date(rng: Random) -> str:
    return f"{rng.randrange(1950, 2030)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


def _path(rng: Random) -> str:
    return "".join(f"/{_word(rng)}" for _ in range(3))


def _name(rng: Random) -> str:
    return _word(rng).capitalize()


def _identifier(rng: Random) -> str:
    return f"{_word(rng)}_{_word(rng)}"


VALUES = (
    _uuid, _hexadecimal, _number, _token, _part, _words, _mail, _ip, _date, _path,
)  # fmt: skip
KEYS = (_word, _words, _part, _name, _identifier)


def _values(rng: Random, count: int) -> list[str]:
    kinds = (rng.choice(VALUES),) if rng.random() < ONE_KIND else VALUES
    return [rng.choice(kinds)(rng) for _ in range(count)]


def _keys(rng: Random, count: int) -> list[str]:
    """Different keys, all of one kind."""
    kind, keys = rng.choice(KEYS), dict[str, None]()
    while len(keys) < count:
        keys.setdefault(kind(rng))
    return list(keys)


def _lines(rng: Random, count: int) -> Document:
    separator = rng.choice(SEPARATORS)
    pairs = zip(_keys(rng, count), _values(rng, count), strict=True)
    lines = [f"{key}{separator}{value}" for key, value in pairs]
    again = rng.sample(lines, count)
    return Document("\n".join(lines), "Write these lines again in another order.", "\n".join(again))


def _questions(rng: Random, count: int) -> Document:
    values = dict(zip(_keys(rng, count), _values(rng, count), strict=True))
    asked = rng.sample(list(values), min(count, rng.randint(2, 4)))
    return Document(
        "\n".join(f"- {key} ({value})" for key, value in values.items()),
        f"What belongs to {', '.join(asked)}?",
        "\n".join(f"To {key} belongs {values[key]}" for key in asked),
    )


def _numbered(rng: Random, count: int) -> Document:
    lines = [f"{number}. {value}" for number, value in enumerate(_values(rng, count), start=1)]
    again = rng.choice((lines, lines[::-1], rng.sample(lines, count)))
    return Document("\n".join(lines), "Repeat the list.", "\n".join(again))


def _objects(rng: Random, count: int) -> Document:
    fields = _keys(rng, 3)
    # Each is as long as three records of other forms.
    rows = [dict(zip(fields, _values(rng, 3), strict=True)) for _ in range(-(-count // 3))]
    again = ({f: row[f] for f in rng.sample(fields, 3)} for row in rng.sample(rows, len(rows)))
    return Document(
        json.dumps(rows, indent=1),
        "Write each record on a line.",
        "\n".join(map(json.dumps, again)),
    )


def _copy(rng: Random, count: int) -> Document:
    text = " ".join(value for _ in range(count) for value in _values(rng, 1))
    return Document(text, "Copy this exactly.", text)


FORMS: tuple[Callable[[Random, int], Document], ...] = (
    _lines, _questions, _numbered, _objects, _copy,
)  # fmt: skip
