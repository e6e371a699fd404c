"""Variable tracking: a chain of assignments scattered over noise."""

from __future__ import annotations

import string
from random import Random

from recalkv_vllm.evaluation.ruler.haystacks import noise_sentences
from recalkv_vllm.evaluation.ruler.needles import insert
from recalkv_vllm.evaluation.ruler.prompt import Cell, Question, Task

HOPS = 4
#: The worked example before the question has as many sentences at most, about 500 tokens.
EXAMPLE_SENTENCES = 100

CONTEXT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{text}\n\nQuestion: Find all variables that are assigned the value {value} in the text above."
)
ANSWER_PREFIX = (
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables "
    "are assigned the value {value}, they are:"
)


def _track(units: int, letters: int, rng: Random) -> Question:
    """A question about one chain of variables with names of so many letters."""
    names: dict[str, None] = {}
    while len(names) < HOPS + 1:
        names.setdefault("".join(rng.choices(string.ascii_uppercase, k=letters)))
    chain = list(names)
    value = str(rng.randrange(10_000, 100_000))
    sources = [value, *(f"VAR {name}" for name in chain[:-1])]
    assignments = [f"VAR {name} = {source}." for name, source in zip(chain, sources, strict=True)]
    places = sorted(rng.random() for _ in chain)
    text = insert(noise_sentences(units, rng), assignments, places)
    style = {"text": " ".join(text), "value": value, "count": len(chain)}
    return Question(CONTEXT.format(**style), ANSWER_PREFIX.format(**style), tuple(chain))


def write(units: int, cell: Cell) -> Question:
    """A question after a worked example of a quarter of its text, or less."""
    rng = cell.random()
    example = _track(min(EXAMPLE_SENTENCES, units // 4), 3, rng)
    question = _track(units, 5, rng)
    shown = f"{example.text} {example.answer_prefix} {' '.join(example.references)}"
    return Question(f"{shown}\n\n{question.text}", question.answer_prefix, question.references)


TRACING_TASKS = {"vt": Task(write, answer_tokens=30)}
