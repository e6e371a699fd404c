"""From a task to a prompt that fills its length, as the model's tokenizer counts."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from recalkv_vllm.compression.errors import InputError


@dataclass(frozen=True, slots=True)
class Cell:
    """What a prompt is made for.

    Args:
        task: its name.
        length: tokens of prompt and answer together, at most.
        depth: where in the text the needle is, 0 (start) to 1 (end); unused by some tasks.
        sample: which of the prompts of this kind.
        seed: of everything random.
    """

    task: str
    length: int
    depth: float
    sample: int
    seed: int

    def random(self) -> random.Random:
        """The same numbers at every call, and others for every other cell."""
        return random.Random(repr(self))


@dataclass(frozen=True, slots=True)
class Question:
    """What a user asks, how the answer begins, and what must be in it."""

    text: str
    answer_prefix: str
    references: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of question.

    Args:
        write: the question of a cell with so many units of text (sentences, words, list entries).
        answer_tokens: how many tokens an answer may have.
        at_depth: whether the answer is in one place, that of the cell's depth.
        least_units: that make it a question.
    """

    write: Callable[[int, Cell], Question]
    answer_tokens: int
    at_depth: bool = False
    least_units: int = 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, how many may be generated, and what must be in them."""

    ids: list[int]
    answer_tokens: int
    references: tuple[str, ...]

    def score(self, answer: str) -> float:
        """Share of the references found in ``answer``, whatever their case."""
        found = [reference.lower() in answer.lower() for reference in self.references]
        return sum(found) / len(found)


def encode(tokenizer, question: Question) -> list[int]:
    """Token ids of a question and the beginning of its answer, in the tokenizer's chat template if
    it has one."""
    if tokenizer.chat_template is None:
        text = f"{question.text} {question.answer_prefix}"
        return tokenizer.encode(text, verbose=False)
    chat = [{"role": "user", "content": question.text}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    # As text: a template begins with the start token itself, where there is one.
    return tokenizer.encode(text + question.answer_prefix, add_special_tokens=False, verbose=False)


def fit_prompt(task: Task, cell: Cell, tokenizer) -> Prompt:
    """The prompt with as many units of text as leave room for the answer in the cell's length.

    Raises:
        InputError: the length does not hold the least text that makes a question.
    """
    budget = cell.length - task.answer_tokens

    def ids_of(units: int) -> list[int]:
        return encode(tokenizer, task.write(units, cell))

    low = task.least_units
    least = len(ids_of(low))
    if least > budget:
        raise InputError(
            f"--lengths {cell.length}: expected at least {least + task.answer_tokens} tokens for "
            f"task {cell.task}"
        )
    # Doubled until too many, then halved: ``low`` fits and ``high`` does not.
    high = 2 * low
    while len(ids_of(high)) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if len(ids_of(middle)) <= budget:
            low = middle
        else:
            high = middle
    question = task.write(low, cell)
    return Prompt(encode(tokenizer, question), task.answer_tokens, question.references)
