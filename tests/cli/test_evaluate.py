"""``recalkv eval``, side by side with a base model, on several texts and in long prompts."""

import json
import math

import pytest

from recalkv_vllm.cli import main
from recalkv_vllm.evaluation import divergence


@pytest.fixture
def run(capsys):
    """``run(*args)``: the JSON object that ``recalkv eval`` prints."""

    def run(*args):
        assert main([*map(str, ("eval", *args)), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


WINDOWS = ("--seq-len", 64, "--max-tokens", 256)


def test_several_texts_beside_a_base_model(tiny, tiny_models, run, capsys, tmp_path):
    texts = ("--dataset", "builtin", "--dataset", "builtin-source", "--dataset", "self")
    plot = tmp_path / "positions.png"
    found = run(tiny, *texts, "--base", tiny_models["mistral"], *WINDOWS, "--plot", plot)
    assert [row["dataset"] for row in found["datasets"]] == ["builtin", "builtin-source", "self"]
    alone = run(tiny, "--dataset", "builtin-source", *WINDOWS)
    base = run(tiny_models["mistral"], "--dataset", "builtin-source", *WINDOWS)
    row = found["datasets"][1]
    assert row["nll"] == alone["nll"]
    assert row["base_nll"] == base["nll"]
    assert row["loss"] == pytest.approx(alone["nll"] - base["nll"])
    assert 0 < row["loss_error"] < 1
    assert [(each["start"], each["end"]) for each in row["positions"]] == [
        (1, 16), (16, 32), (32, 64),
    ]  # fmt: skip
    for name in ("nll", "base_nll"):
        total = math.fsum(each[name] * each["tokens"] for each in row["positions"])
        assert total / row["tokens"] == pytest.approx(row[name])
    assert plot.read_bytes().startswith(b"\x89PNG")
    # Written by the base model, in windows as of the other texts.
    assert found["datasets"][2]["tokens"] == 4 * 63

    assert main([*map(str, ("eval", tiny, *texts[:4], "--base", tiny, *WINDOWS))]) == 0
    shown = capsys.readouterr().out
    assert shown.count("+0.0000") == 2 + 2  # in the table, and in the lines below it
    assert "builtin-source, windows of 64, transformers): " in shown


def test_answers_diverge_where_models_differ(tiny, tiny_models, run, monkeypatch):
    monkeypatch.setattr(divergence, "ANSWER_TOKENS", 4)
    same = run(tiny, "--metric", "divergence", "--base", tiny)
    assert (same["same"], same["median_tokens"]) == (1, same["base_tokens"])
    other = run(tiny, "--metric", "divergence", "--base", tiny_models["mistral"])
    assert other["same"] < 1
    assert other["mean_tokens"] < other["base_tokens"]


def test_common_tokens():
    assert divergence.common_tokens([1, 2, 3], [1, 2, 4]) == 2
    assert divergence.common_tokens([1, 2], [1, 2, 4]) == 2
    assert divergence.common_tokens([5], [1]) == 0


def test_ruler_beside_a_base_model(make_model, run, capsys, tmp_path):
    model = make_model("llama", max_position_embeddings=1024)
    plot, answers = tmp_path / "depths.png", tmp_path / "answers.jsonl"
    arguments = (
        *(model, "--metric", "ruler", "--tasks", "niah_single_1", "fwe", "--lengths", 800, 1024),
        *("--depths", 0, 1, "--samples", 1, "--base", model, "--answers", answers),
    )
    found = run(*arguments, "--plot", plot)
    assert [(row["task"], row["length"], row["prompts"]) for row in found["rows"]] == [
        ("niah_single_1", 800, 2),
        ("niah_single_1", 1024, 2),
        ("fwe", 800, 2),
        ("fwe", 1024, 2),
    ]
    assert all(row["score"] == row["base_score"] for row in found["rows"])
    assert [(cell["task"], cell["length"], cell["depth"]) for cell in found["cells"]] == [
        ("niah_single_1", length, depth) for length in (800, 1024) for depth in (0, 1)
    ]
    assert plot.read_bytes().startswith(b"\x89PNG")
    # Base and model are the same directory: each answer is asked for once per model.
    assert len(answers.read_text().splitlines()) == 16
    assert main([*map(str, ("eval", *arguments))]) == 0
    assert len(answers.read_text().splitlines()) == 16
    assert "base below 50%" in capsys.readouterr().out


def test_a_dtype_is_for_vllm(tiny, capsys):
    arguments = ("eval", tiny, "--dataset", "builtin", "--dtype", "bfloat16")
    assert main([*map(str, arguments)]) == 2
    assert "--dtype bfloat16: expected --engine vllm, found transformers" in capsys.readouterr().err
