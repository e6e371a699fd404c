"""Text sampled from the model: its own distribution, without ends, the same for the same seed."""

import json

import pytest
import torch

from recalkv_vllm.cli import main
from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.calibration.self_text import sample_self
from recalkv_vllm.compression.errors import InputError


def test_same_seed_same_samples(tiny, load):
    model, tokenizer = load(), BaseModel(tiny).tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(300)
    first = sample_self(model, tokenizer, 80, 24, seed=1)
    assert first.shape == (80, 24)
    torch.testing.assert_close(sample_self(model, tokenizer, 80, 24, seed=1), first)
    assert not torch.equal(sample_self(model, tokenizer, 80, 24, seed=2), first)
    assert tokenizer.eos_token_id == 300
    assert not (first[:, 1:] == 300).any()


def test_nothing_is_cut_off(tiny, load):
    """A random model is nearly uniform: its own choices are many more than the likeliest few."""
    drawn = sample_self(load(), BaseModel(tiny).tokenizer(), 256, 2, seed=0)[:, 1]
    assert len(drawn.unique()) > 100


def test_callers_random_numbers_stay(tiny, load):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sample_self(load(), BaseModel(tiny).tokenizer(), 1, 4, seed=0)
    torch.testing.assert_close(torch.rand(3), expected)


def test_a_tokenizer_without_ends(tiny, load):
    tokenizer = BaseModel(tiny).tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(InputError, match="--dataset self: the tokenizer has no token"):
        sample_self(load(), tokenizer, 1, 4, seed=0)


def test_compress_on_it(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["compress", str(tiny), "-o", str(out), "--compression", "0.5", "--dataset", "self"]
    assert main([*command, "--num-samples", "16", "--seq-len", "64"]) == 0
    capsys.readouterr()
    calibration = json.loads((out / "config.json").read_text())["recalkv"]["calibration"]
    assert calibration["dataset"] == "self"
    assert calibration["samples"] == 16
