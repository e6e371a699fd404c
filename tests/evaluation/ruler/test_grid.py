"""Scores of one and two models, and runs that are interrupted."""

from __future__ import annotations

import json
import shutil

import pytest

from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.evaluation.context import longest_context
from recalkv_vllm.evaluation.ruler.answers import AnswerFile
from recalkv_vllm.evaluation.ruler.grid import Grid, make_prompts, score_model, summarize
from recalkv_vllm.evaluation.ruler.prompt import Cell


class Reader:
    """An engine that finds keys in the first half of a prompt only."""

    def __init__(self, tokenizer, stop_after=None):
        self.tokenizer = tokenizer
        self.stop_after = stop_after
        self.asked = 0

    def generate(self, model, prompts, max_tokens):
        for prompt in prompts:
            if self.asked == self.stop_after:
                raise KeyboardInterrupt
            self.asked += 1
            text = self.tokenizer.decode(prompt)
            at = text.index("The pass key is ") + len("The pass key is ")
            found = text[at : at + 5] if at < len(text) / 2 else "nothing"
            yield self.tokenizer.encode(f" {found}.")


GRID = Grid(["passkey"], [500, 900], [0.0, 1.0], samples=3, seed=7)


def score(reader, model, path=None, grid=GRID):
    prompts = make_prompts(grid, reader.tokenizer)
    return score_model(
        reader, model, reader.tokenizer, prompts, AnswerFile(path, model, "transformers")
    )


def test_grid(tokenizer, tiny):
    result = summarize({"score": score(Reader(tokenizer), tiny)})
    assert result["score"] == 0.5
    assert result["prompts"] == 12
    cells = {(row["length"], row["depth"]): row["score"] for row in result["cells"]}
    assert cells == {(500, 0.0): 1, (500, 1.0): 0, (900, 0.0): 1, (900, 1.0): 0}
    assert [(row["length"], row["score"], row["prompts"]) for row in result["rows"]] == [
        (500, 0.5, 6),
        (900, 0.5, 6),
    ]


def test_no_share_is_taken_of_a_low_score():
    cells = [Cell("vt", 1024, 0, i, 0) for i in range(4)]
    for base, retained in ((0.49, None), (0.5, 0.5), (1.0, 0.25)):
        scores = {"score": dict.fromkeys(cells, 0.25), "base_score": dict.fromkeys(cells, base)}
        (row,) = summarize(scores)["rows"]
        assert row["retained"] == retained
        assert row["base_score"] == pytest.approx(base)
    assert summarize(scores)["cells"] == []  # the task has no depth


def test_error_of_a_share():
    cells = [Cell("vt", 1024, 0, i, 0) for i in range(4)]
    low = [Cell("cwe", 1024, 0, i, 0) for i in range(4)]
    base = dict(zip(cells, (1, 1, 1, 0), strict=True)) | dict.fromkeys(low, 0.1)
    ours = dict(zip(cells, (1, 1, 0, 0), strict=True)) | dict.fromkeys(low, 1.0)
    result = summarize({"score": ours, "base_score": base})
    # 1/3, 1/3, -2/3 and 0 remain of what 2/3 of the base model's scores are; their mean is 0.
    deviation = ((1 / 9 + 1 / 9 + 4 / 9) / 3) ** 0.5
    row = result["rows"][0]
    assert row["retained"] == pytest.approx(2 / 3)
    assert row["retained_error"] == pytest.approx(deviation / 2 / (3 / 4))
    # The task that the base model does not solve has no part in the share of all.
    assert (result["retained"], result["retained_error"]) == (
        row["retained"],
        row["retained_error"],
    )
    one = summarize({"score": {cells[0]: 1}, "base_score": {cells[0]: 1}})
    assert (one["retained"], one["retained_error"]) == (1, None)
    assert "retained" not in summarize({"score": {low[0]: 1}, "base_score": {low[0]: 0}})


def test_an_interrupted_run_goes_on(tokenizer, tiny, tmp_path):
    path = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        score(Reader(tokenizer, stop_after=5), tiny, path)
    assert len(path.read_text().splitlines()) == 5
    with path.open("a") as f:
        f.write('{"model": "cut o')
    reader = Reader(tokenizer)
    scores = score(reader, tiny, path)
    assert reader.asked == 7
    assert scores == score(Reader(tokenizer), tiny)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 12
    assert [row["score"] for row in rows] == list(scores.values())
    again = Reader(tokenizer)
    assert score(again, tiny, path) == scores
    assert again.asked == 0


def test_answers_of_another_model_or_grid_do_not_count(tokenizer, tiny, tmp_path):
    path, model = tmp_path / "answers.jsonl", tmp_path / "model"
    shutil.copytree(tiny, model)
    score(Reader(tokenizer), model, path)
    config = model / "config.json"
    config.write_text(config.read_text() + "\n")
    for changed in (GRID, Grid(["passkey"], [500, 900], [0.0, 1.0], samples=3, seed=8)):
        reader = Reader(tokenizer)
        score(reader, model, path, changed)
        assert reader.asked == 12


@pytest.mark.parametrize("text", ["no answers\n", "[1]\n", '{"other": 1}\n', "cut off"])
def test_a_file_of_something_else_is_left_alone(tiny, tmp_path, text):
    path = tmp_path / "notes.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match="expected the answers of an earlier run, or no such file"):
        AnswerFile(path, tiny, "vllm")
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"max_position_embeddings": 8192}, 8192),
        ({"max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default"}}, 8192),
        (
            {"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 4.0}},
            8192,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        ({}, None),
    ],
)
def test_longest_context(config, longest):
    assert longest_context(config) == longest
