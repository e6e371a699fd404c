"""Samples of several datasets: equal shares, in turn, and more of them begin with the same ones."""

import json
import logging

import pytest
import torch

from recalkv_vllm.cli import main
from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.calibration import samples
from recalkv_vllm.compression.calibration.calibrate import draw
from recalkv_vllm.compression.calibration.samples import draw_samples, interleave, shares
from recalkv_vllm.compression.check import check
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.options import CompressOptions


@pytest.fixture
def texts(tmp_path):
    """Two files without a token in common, but for spaces."""
    paths = tmp_path / "digits.txt", tmp_path / "letters.txt"
    paths[0].write_text("01234 56789 " * 500)
    paths[1].write_text("QXZJ " * 1000)
    return tuple(map(str, paths))


def options_of(tiny, tmp_path, datasets, **options) -> CompressOptions:
    return CompressOptions(str(tiny), tmp_path / "out", 0.5, datasets=datasets, **options)


def drawn(tiny, tmp_path, datasets, num_samples, seq_len=16) -> torch.Tensor:
    options = options_of(tiny, tmp_path, datasets, num_samples=num_samples, seq_len=seq_len)
    return draw(BaseModel(tiny), options, torch.float32, "cpu", num_samples)


@pytest.mark.parametrize(
    ("num_samples", "parts", "expected"),
    [(8, 2, [4, 4]), (7, 2, [4, 3]), (7, 3, [3, 2, 2]), (2, 2, [1, 1]), (5, 1, [5])],
)
def test_shares(num_samples, parts, expected):
    assert shares(num_samples, parts) == expected


def test_interleave_goes_on_without_parts_that_are_used_up():
    parts = [torch.tensor([[0], [1], [2], [3]]), torch.tensor([[10]]), torch.tensor([[20], [21]])]
    assert interleave(parts).flatten().tolist() == [0, 10, 20, 1, 21, 2, 3]


def test_datasets_take_turns(tiny, tmp_path, texts):
    tokenizer = BaseModel(tiny).tokenizer()
    mixed = [tokenizer.decode(sample) for sample in drawn(tiny, tmp_path, texts, 7)]
    assert [set(text.strip()) <= set("0123456789 ") for text in mixed] == [True, False] * 3 + [True]
    assert all(set(text) <= set("QXZJ ") for text in mixed[1::2])


@pytest.mark.parametrize(
    "datasets", [("builtin",), ("self", "builtin"), ("builtin", "self", "recall")]
)
def test_more_samples_begin_with_the_same_ones(tiny, tmp_path, datasets):
    few = drawn(tiny, tmp_path, datasets, 5)
    assert len({tuple(sample) for sample in few.tolist()}) == 5
    more = drawn(tiny, tmp_path, datasets, 12)
    assert torch.equal(more[:5], few)


def test_more_samples_of_a_long_text_begin_with_the_same_ones(tokenizer, monkeypatch):
    """However much text there is, as much is read for a few samples as for some more."""
    monkeypatch.setattr(samples, "READ_TOKENS", 4096)
    monkeypatch.setattr(samples, "BLOCK", 100)
    text = [f"{number} and " * 20 for number in range(1000)]
    few, more = (draw_samples(text, tokenizer, count, 16, seed=3) for count in (20, 100))
    assert len(more) == 100
    assert torch.equal(more[:20], few)


def test_a_missing_file_shows_before_the_model_writes(tiny, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the model writes text")

    monkeypatch.setattr("recalkv_vllm.compression.calibration.calibrate.sample_self", never)
    with pytest.raises(InputError, match="no such file"):
        drawn(tiny, tmp_path, ("self", "/nowhere/text.txt"), 4)


def test_found_twice(tiny, tmp_path):
    with pytest.raises(InputError, match="--dataset builtin: found twice; expected each dataset"):
        check(options_of(tiny, tmp_path, ("builtin", "self", "builtin")))


def test_fewer_samples_than_datasets(tiny, tmp_path):
    message = r"--num-samples 1: expected at least 2, one of each dataset \(self, builtin\)"
    with pytest.raises(InputError, match=message):
        check(options_of(tiny, tmp_path, ("self", "builtin"), num_samples=1))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "self + builtin + recall"),
        (["--dataset", "builtin"], "builtin"),
        (["--dataset", "digits.txt", "--dataset", "builtin"], "digits.txt + builtin"),
    ],
)
def test_provenance_names_every_dataset(
    tiny, tmp_path, texts, capsys, caplog, monkeypatch, arguments, expected
):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    command = ["compress", str(tiny), "-o", str(out), "--compression", "0.5", *arguments]
    with caplog.at_level(logging.WARNING):
        assert main([*command, "--num-samples", "10", "--seq-len", "32"]) == 0
    capsys.readouterr()
    calibration = json.loads((out / "config.json").read_text())["recalkv"]["calibration"]
    assert calibration["dataset"] == expected
    assert calibration["samples"] == 10
    assert f"10 samples of 32 tokens of {expected} (seed 42)" in (out / "README.md").read_text()
    assert not caplog.records
