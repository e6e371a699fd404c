"""Text sampled from the model: its own distribution, text after text, kept for the next time."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from recalkv_vllm.cli import main
from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.calibration import self_text
from recalkv_vllm.compression.calibration.prompts import Prompts
from recalkv_vllm.compression.calibration.self_text import ROWS, sample, sample_self, write_rows
from recalkv_vllm.compression.errors import InputError, OutputError
from recalkv_vllm.compression.progress import Stage


@pytest.fixture
def tiny_tokenizer(tiny):
    return BaseModel(tiny).tokenizer()


def never():
    raise AssertionError("the model was loaded")


def prompts_of(*kinds: list[list[int]], end: int | None = None) -> Prompts:
    return Prompts(tuple(tuple(map(tuple, kind)) for kind in kinds), end)


def rows_of(model, prompts: Prompts, tokens: int, seed: int = 0) -> list[list[int]]:
    return write_rows(model, prompts, 0, range(ROWS), tokens, seed, Stage("", 1)).tolist()


def test_same_seed_same_samples(load, tiny_tokenizer, tmp_path):
    def draw(where: str, seed: int) -> torch.Tensor:
        return sample_self(load, tiny_tokenizer, 80, 24, seed, tmp_path / where)

    first = draw("first", seed=1)
    assert first.shape == (80, 24)
    torch.testing.assert_close(draw("second", seed=1), first)
    assert not torch.equal(draw("first", seed=2), first)


def test_nothing_is_written_twice(load, tiny_tokenizer, tmp_path):
    first = sample_self(load, tiny_tokenizer, ROWS, 24, 1, tmp_path)
    torch.testing.assert_close(sample_self(never, tiny_tokenizer, ROWS, 24, 1, tmp_path), first)
    fewer = sample_self(never, tiny_tokenizer, 3, 24, 1, tmp_path)
    torch.testing.assert_close(fewer, first[:3])
    more = sample_self(load, tiny_tokenizer, ROWS + 1, 24, 1, tmp_path)
    torch.testing.assert_close(more[:ROWS], first)
    assert not (more[ROWS] == first).all(dim=1).any()


def test_rows_are_written_as_they_are_asked_for(load, tiny_tokenizer, tmp_path):
    def draw(where: str, samples: int) -> torch.Tensor:
        return sample_self(load, tiny_tokenizer, samples, 24, 1, tmp_path / where)

    few = draw("in parts", 5)
    (batch,) = (tmp_path / "in parts").rglob("*.npy")
    assert np.load(batch).shape == (5, 24)
    more = draw("in parts", 13)
    torch.testing.assert_close(more[:5], few)
    torch.testing.assert_close(more, draw("at once", 13))


def test_a_row_depends_on_nothing_but_its_own_tokens(load):
    """The cache of keys and values gives the logits that the whole row gives at once."""
    model = load()
    prompts = prompts_of([[7, 8, 9], [10]], end=None)
    rows = torch.tensor(rows_of(model, prompts, 12))
    with torch.no_grad():
        logits = model(rows).logits[:, :-1] / temperatures()
    uniform = torch.rand(12, ROWS, generator=torch.Generator().manual_seed(0))
    for row in range(0, ROWS, 7):
        prompt = len([[7, 8, 9], [10]][row % 2])
        for step in range(prompt - 1, 11):
            drawn = sample(logits[row, step : step + 1], uniform[step, row : row + 1])
            assert drawn.item() == rows[row, step + 1].item()


def temperatures() -> torch.Tensor:
    ladder = torch.tensor(self_text.TEMPERATURES)
    return ladder.repeat(ROWS)[:ROWS].view(-1, 1, 1)


def test_a_prompt_follows_every_end(load, monkeypatch):
    """A random model soon draws any token: here half of the vocabulary ends a text."""
    monkeypatch.setattr(self_text, "_ends", lambda *_: set(range(256)))
    for row in rows_of(load(), prompts_of([[300, 301, 302]]), 60):
        assert row[:3] == [300, 301, 302]
        ends = [at for at, token in enumerate(row) if token < 256]
        assert ends
        for at in ends:
            assert row[at + 1 : at + 4] == [300, 301, 302][: 59 - at]


def test_a_text_without_end_is_cut_off(load, monkeypatch):
    monkeypatch.setattr(self_text, "TEXT_TOKENS", 10)
    monkeypatch.setattr(self_text, "_ends", lambda *_: set())
    for row in rows_of(load(), prompts_of([[300, 301]]), 24):
        assert row[:2] == row[10:12] == row[20:22] == [300, 301]


def test_ends_are_those_of_tokenizer_and_model(load):
    model = load()
    model.generation_config.eos_token_id = [5, 6]
    assert self_text._ends(model, prompts_of([[1]], end=4)) == {4, 5, 6}
    model.generation_config.eos_token_id = 6
    assert self_text._ends(model, prompts_of([[1]], end=None)) == {6}


@pytest.mark.parametrize("seq_len", [512, 513, 1100])
def test_long_samples_are_several_rows(tiny_tokenizer, monkeypatch, tmp_path, seq_len):
    written = []

    def write(model, prompts, batch, rows, row_tokens, seed, stage):
        written.append(row_tokens)
        first = (batch * ROWS + rows.start) * row_tokens
        return torch.arange(first, first + len(rows) * row_tokens).view(len(rows), row_tokens)

    monkeypatch.setattr(self_text, "write_rows", write)
    samples = sample_self(lambda: None, tiny_tokenizer, 25, seq_len, 0, tmp_path)
    assert samples.shape == (25, seq_len)
    assert max(written) <= 512
    start = -(-seq_len // max(written)) * max(written)
    assert samples[:, 0].tolist() == [start * index for index in range(25)]
    assert (samples.diff(dim=1) == 1).all()


def test_nothing_is_cut_off(load, tmp_path):
    """A random model is nearly uniform: its own choices are many more than the likeliest few."""
    rows = rows_of(load(), prompts_of([[1]]), 24)
    assert len({token for row in rows[1::2] for token in row}) > 100


def test_draws_follow_the_distribution():
    uniform = (torch.arange(100_000) + 0.5) / 100_000
    logits = torch.tensor([0.1, 0.0, 0.6, 0.3]).log().expand(len(uniform), -1)
    drawn = torch.bincount(sample(logits, uniform), minlength=4) / len(uniform)
    torch.testing.assert_close(drawn, torch.tensor([0.1, 0.0, 0.6, 0.3]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_extreme_draws_are_possible_tokens(uniform):
    logits = torch.full((1, 1001), float("-inf"))
    logits[0, 3:700] = torch.linspace(-1, 1, 697)
    assert 3 <= sample(logits, torch.tensor([uniform])).item() < 700


def test_callers_random_numbers_stay(load, tiny_tokenizer, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sample_self(load, tiny_tokenizer, 1, 4, 0, tmp_path)
    torch.testing.assert_close(torch.rand(3), expected)


def test_a_tokenizer_without_ends(tiny_tokenizer, tmp_path):
    tiny_tokenizer.bos_token = tiny_tokenizer.eos_token = None
    with pytest.raises(InputError, match="--dataset self: the tokenizer has no token"):
        sample_self(never, tiny_tokenizer, 1, 4, 0, tmp_path)


def test_a_cache_that_cannot_be_written(load, tiny_tokenizer, tmp_path):
    path = tmp_path / "file"
    path.write_text("in the way")
    with pytest.raises(OutputError, match=r"calibration text .* \(in RECALKV_CACHE\)"):
        sample_self(never, tiny_tokenizer, 1, 4, 0, path)


def test_other_prompts_other_text(load, tiny_tokenizer, tmp_path):
    first = sample_self(load, tiny_tokenizer, 6, 16, 0, tmp_path)
    tiny_tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert not torch.equal(sample_self(load, tiny_tokenizer, 6, 16, 0, tmp_path), first)


def test_compress_on_it(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["compress", str(tiny), "-o", str(out), "--compression", "0.5", "--dataset", "self"]
    assert main([*command, "--num-samples", "16", "--seq-len", "64"]) == 0
    capsys.readouterr()
    calibration = json.loads((out / "config.json").read_text())["recalkv"]["calibration"]
    assert calibration["dataset"] == "self"
    assert calibration["samples"] == 16


def test_kept_beside_the_statistics(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RECALKV_CACHE", str(tmp_path / "here"))
    command = ["compress", str(tiny), "-o", str(tmp_path / "out"), "--compression", "0.5"]
    assert main([*command, "--num-samples", "16", "--seq-len", "64"]) == 0
    capsys.readouterr()
    (batch,) = Path(tmp_path / "here" / "self-text").rglob("*.npy")
    rows, tokens = np.load(batch).shape
    assert 0 < rows < 16
    assert tokens == 64
