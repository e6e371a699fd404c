"""Needles in a haystack: values hidden in long text, to be found by their keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from recalkv_vllm.evaluation.ruler.haystacks import (
    draw_compound,
    draw_number,
    draw_uuid,
    noise_sentences,
    text_sentences,
)
from recalkv_vllm.evaluation.ruler.prompt import Cell, Question, Task

ANSWER_TOKENS = 128
PASSKEY_ANSWER_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Wording:
    """Format strings: of ``kind`` of value, a needle's ``key`` and ``value``, and ``query``."""

    intro: str
    needle: str
    question: str
    answer_prefix: str


ONE = Wording(
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the {kind} afterwards.",
    "One of the special magic {kind}s for {key} is: {value}.",
    "What is the special magic {kind} for {query} mentioned in the provided text?",
    "The special magic {kind} for {query} mentioned in the provided text is",
)
MANY = Wording(
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the {kind}s afterwards.",
    ONE.needle,
    "What are all the special magic {kind}s for {query} mentioned in the provided text?",
    "The special magic {kind}s for {query} mentioned in the provided text are",
)
#: Landmark Attention (arXiv 2305.16300).
PASSKEY = Wording(
    "There is important information hidden inside a lot of irrelevant text. Find it and memorise "
    "it.",
    "The pass key is {value}. Remember it. {value} is the pass key.",
    "What is the pass key?",
    "The pass key is",
)


def needle_task(
    haystack: Callable[[int, Random], list[str]] | None,
    *,
    draw_key: Callable[[Random], str] = draw_compound,
    draw_value: Callable[[Random], str] = draw_number,
    kind: str = "number",
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
    wording: Wording | None = None,
    answer_tokens: int = ANSWER_TOKENS,
) -> Task:
    """The task of finding all values of one or more keys.

    Args:
        haystack: so many units of text as sentences; None: other needles.
        draw_key: a key.
        draw_value: a value.
        kind: what a value is.
        keys: needles of different keys.
        values: needles of each key.
        queries: keys that are asked for.
        wording: of the question.
        answer_tokens: how many an answer may have.
    """
    single = values * queries == 1
    words = wording or (ONE if single else MANY)

    def write(units: int, cell: Cell) -> Question:
        rng = cell.random()
        names: dict[str, None] = {}
        while len(names) < keys:
            names.setdefault(draw_key(rng))
        hidden = [(key, draw_value(rng)) for key in names for _ in range(values)]
        places = [cell.depth if single and i == 0 else rng.random() for i in range(len(hidden))]

        def needle(key: str, value: str) -> str:
            return words.needle.format(kind=kind, key=key, value=value)

        if haystack is not None:
            sentences = haystack(units, rng)
        else:
            others = ((draw_key(rng), draw_value(rng)) for _ in range(units))
            sentences = [needle(key, value) for key, value in others if key not in names]
        text = insert(sentences, [needle(*each) for each in hidden], places)
        asked = list(names)[:queries]
        style = {"kind": kind, "query": enumerate_words(asked)}
        return Question(
            f"{words.intro.format(**style)}\n\n{' '.join(text)}\n\n"
            f"{words.question.format(**style)}",
            words.answer_prefix.format(**style),
            tuple(value for _, value in hidden[: queries * values]),
        )

    return Task(write, answer_tokens, at_depth=single)


def insert(sentences: list[str], needles: list[str], places: list[float]) -> list[str]:
    """The sentences with needles among them, each at its place from 0 (first) to 1 (last)."""
    text = list(sentences)
    # From the end on: what is inserted moves nothing that comes before it.
    for place, needle in sorted(zip(places, needles, strict=True), reverse=True):
        text.insert(round(place * len(sentences)), needle)
    return text


def enumerate_words(words: list[str]) -> str:
    """``a``, ``a, and b``, ``a, b, and c``."""
    return ", ".join([*words[:-1], f"and {words[-1]}"]) if len(words) > 1 else words[0]


NEEDLE_TASKS = {
    "niah_single_1": needle_task(noise_sentences),
    "niah_single_2": needle_task(text_sentences),
    "niah_single_3": needle_task(text_sentences, draw_value=draw_uuid, kind="uuid"),
    "niah_multikey_1": needle_task(text_sentences, keys=4),
    "niah_multikey_2": needle_task(None),
    "niah_multikey_3": needle_task(None, draw_key=draw_uuid, draw_value=draw_uuid, kind="uuid"),
    "niah_multivalue": needle_task(text_sentences, values=4),
    "niah_multiquery": needle_task(text_sentences, keys=4, queries=4),
}
#: The simplest case, and a metric of its own.
PASSKEY_TASK = needle_task(
    noise_sentences,
    draw_value=lambda rng: str(rng.randrange(10_000, 100_000)),
    wording=PASSKEY,
    answer_tokens=PASSKEY_ANSWER_TOKENS,
)
