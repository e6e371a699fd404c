"""Prompts fill their length, and have the answer to the question they ask."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.evaluation.ruler.haystacks import NOISE, draw_words
from recalkv_vllm.evaluation.ruler.prompt import Cell, Prompt, Question, Task, encode, fit_prompt
from recalkv_vllm.evaluation.ruler.tasks import TASKS, find_task

NEEDLES = [name for name, task in TASKS.items() if task.at_depth]
UNITS = 400


def question(task: str, depth: float = 0.5, sample: int = 0, seed: int = 0, length: int = 4096):
    return TASKS[task].write(UNITS, Cell(task, length, depth, sample, seed))


@pytest.mark.parametrize("length", [2500, 3001])
@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_fills_its_length(tokenizer, task, length):
    cell = Cell(task, length, 0.5, 0, 0)
    budget = length - TASKS[task].answer_tokens
    prompt = fit_prompt(TASKS[task], cell, tokenizer)
    assert len(prompt.ids) <= budget
    assert prompt.answer_tokens == TASKS[task].answer_tokens
    # Another unit of text, of 120 tokens at the most (two UUIDs), would be too much.
    assert budget - len(prompt.ids) < 130
    assert prompt == fit_prompt(TASKS[task], cell, tokenizer)


def test_no_unit_more_would_fit(tokenizer):
    """Of text that grows by the same for every unit, whatever the length."""
    task = Task(lambda units, cell: Question("a " * units, "b", ("c",)), answer_tokens=7)
    for length in range(40, 60):
        prompt = fit_prompt(task, Cell("letters", length, 0, 0, 0), tokenizer)
        one_more = encode(tokenizer, Question(tokenizer.decode(prompt.ids)[:-1] + "a ", "b", ()))
        assert len(prompt.ids) <= length - 7 < len(one_more)


@pytest.mark.parametrize("task", TASKS)
def test_too_short_a_length_is_refused(tokenizer, task):
    with pytest.raises(InputError, match=f"--lengths 60: expected at least .* for task {task}"):
        fit_prompt(TASKS[task], Cell(task, 60, 0.5, 0, 0), tokenizer)


def test_unknown_task():
    with pytest.raises(InputError, match="--tasks qa: unknown; expected one of passkey, niah_sin"):
        find_task("qa")


def test_the_chat_template_is_used(tokenizer, monkeypatch):
    monkeypatch.setattr(
        tokenizer, "chat_template", "<user>{{ messages[0]['content'] }}</user><model>"
    )
    ids = encode(tokenizer, Question("Who?", "It is", ()))
    assert tokenizer.decode(ids) == "<user>Who?</user><model>It is"


@pytest.mark.parametrize("task", TASKS)
def test_every_cell_has_a_question_of_its_own(task):
    assert question(task) == question(task)
    others = [question(task), question(task, sample=1), question(task, seed=1)]
    assert len({each.text for each in others}) == 3
    assert len({each.references for each in others}) == 3


@pytest.mark.parametrize("task", [name for name in TASKS if name.startswith("niah")])
def test_asked_values_are_those_of_the_asked_keys(task):
    asked = question(task)
    hidden: dict[str, list[str]] = {}
    for key, value in re.findall(r"magic (?:number|uuid)s for (\S+) is: (\S+?)\.", asked.text):
        hidden.setdefault(key, []).append(value)
    query = asked.text.splitlines()[-1]
    assert query.endswith("mentioned in the provided text?")
    keys = [key for key in hidden if key in query]
    found = sorted(value for key in keys for value in hidden[key])
    assert found == sorted(asked.references)
    expected = {"niah_multivalue": (1, 4), "niah_multiquery": (4, 4)}.get(task, (1, 1))
    assert (len(keys), len(found)) == expected
    distractors = {"niah_multikey_1": 3, "niah_multikey_2": UNITS, "niah_multikey_3": UNITS}
    assert len(hidden) - len(keys) == pytest.approx(distractors.get(task, 0), abs=2)


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("task", NEEDLES)
def test_the_needle_is_at_its_depth(task, depth):
    asked = question(task, depth)
    text = asked.text.split("\n\n", 1)[1].rsplit("\n\n", 1)[0]
    at = text.index(asked.references[0]) / len(text)
    # A needle is up to 3 % of so short a text, and sentences differ in length.
    assert at == pytest.approx(depth, abs=0.12)
    if depth == 1:
        assert asked.references[0] in text[-100:]


def test_passkey_is_said_twice_and_asked_for():
    asked = question("passkey")
    assert asked.text.count(asked.references[0]) == 2
    assert asked.text.endswith("\n\nWhat is the pass key?")
    assert asked.answer_prefix == "The pass key is"
    assert sum(asked.text.count(sentence) for sentence in NOISE) == UNITS


def test_tracked_variables_are_a_chain():
    asked = question("vt")
    example, text = asked.text.split("\n\nMemorize and track")
    for part, letters in ((example, 3), (text, 5)):
        assigned = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", part))
        assert {len(name) for name in assigned} == {letters}
        (value,) = re.findall(r"assigned the value (\d+) in the text above", part)
        chain = []
        for name in assigned:
            source = name
            while source in assigned:
                source = assigned[source]
            if source == value:
                chain.append(name)
        assert len(chain) == 5
        if part is text:
            assert tuple(chain) == asked.references
        else:
            assert part.endswith(" ".join(chain))


@pytest.mark.parametrize(("length", "counts"), [(4096, (30, 3)), (4095, (8, 1))])
def test_common_words_are_the_most_common(length, counts):
    asked = question("cwe", length=length)
    text = asked.text.rsplit("Below is a numbered list", 1)[1]
    found = Counter(re.findall(r"\d+\. ([a-z-]+)", text))
    ranked = found.most_common()
    assert {word for word, _ in ranked[:10]} == set(asked.references)
    assert {count for _, count in ranked[:10]} == {counts[0]}
    assert {count for _, count in ranked[10:]} == {counts[1]}
    assert len(ranked) == 10 + UNITS


def test_frequent_words_follow_zipf():
    asked = question("fwe")
    words = asked.text.split("coded words. ")[1].split("\nQuestion")[0].split()
    ranked = Counter(words).most_common()
    assert ranked[0][0] == "..."
    assert tuple(word for word, _ in ranked[1:4]) == asked.references
    assert ranked[4][1] < ranked[3][1] < ranked[2][1] < ranked[1][1]
    # The n-th of 2001 words has a share of n^-2 over the sum of them, which is close to pi^2/6.
    assert ranked[1][1] == pytest.approx(UNITS / 4 / 1.6444, abs=1)


def test_words_last_for_any_length():
    cell = Cell("cwe", 0, 0, 0, 0)
    words = draw_words(10_000, cell.random())
    assert len(set(words)) == 10_000
    assert words[:50] == draw_words(50, cell.random())


def test_score_is_the_share_of_references_found():
    prompt = Prompt([1], 5, ("Alpha", "beta", "1234"))
    assert prompt.score("ALPHA and 12345") == pytest.approx(2 / 3)
    assert prompt.score("") == 0
