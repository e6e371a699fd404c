"""Calibration text from every kind of source, and the samples cut from it."""

import json

import pandas
import pytest
import torch

from recalkv_vllm.compression.calibration.builtin_text import builtin_documents
from recalkv_vllm.compression.calibration.samples import draw_samples, start_tokens, tokenize
from recalkv_vllm.compression.calibration.text import describe, documents
from recalkv_vllm.compression.errors import InputError

TEXTS = ["A first document.", "", "A second one,\nof two lines."]


def test_plain_text_is_one_document(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("één\n\ntwo\n", encoding="utf-8")
    assert list(documents(str(path))) == ["één\n\ntwo\n"]
    assert describe(str(path)) == "text.txt"


@pytest.mark.parametrize("column", ["text", "body"])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_tables(tmp_path, ending, column):
    path = tmp_path / f"table.{ending}"
    rows = [{"id": i, column: text} for i, text in enumerate(TEXTS)]
    if ending == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        pandas.DataFrame(rows).to_parquet(path)
    assert list(documents(str(path), column)) == TEXTS
    with pytest.raises(InputError, match=rf"no column 'other'; found id, {column}"):
        list(documents(str(path), "other"))
    with pytest.raises(InputError, match="column 'id' holds int"):
        list(documents(str(path), "id"))


def test_builtin_is_much_text_and_always_the_same():
    first = list(builtin_documents())
    assert sum(map(len, first)) > 400_000
    assert first == list(builtin_documents())


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("/nowhere/text", "no such file"),
        ("./text", "no such file"),
        ("missing.jsonl", "no such file"),
        (".", "is a directory"),
    ],
)
def test_missing_files(dataset, message):
    with pytest.raises(InputError, match=message):
        list(documents(dataset))


def test_hub_out_of_reach(monkeypatch):
    """One line that says what to use in its place."""
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\nwith details")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match=r"Couldn't reach the hub\).*\.txt.*builtin") as caught:
        list(documents("owner/name"))
    assert "\n" not in str(caught.value)


def test_hub_name_with_configuration_and_split(monkeypatch):
    import datasets

    calls = []

    def load(*args, **kwargs):
        calls.append((*args, kwargs["split"]))
        return [{"text": "x"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("owner/name", "owner/name:config", "owner/name:config:test"):
        assert list(documents(name)) == ["x"]
    assert calls == [
        ("owner/name", None, "train"),
        ("owner/name", "config", "train"),
        ("owner/name", "config", "test"),
    ]


@pytest.mark.parametrize(
    ("name", "content"), [("broken.jsonl", b"{not json"), ("broken.parquet", b"no parquet")]
)
def test_broken_tables(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a readable table"):
        list(documents(str(path)))


def test_not_utf8(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(InputError, match="UTF-8"):
        list(documents(str(path)))


def test_samples_do_not_overlap_and_follow_the_seed(tokenizer):
    text = " ".join(str(i) for i in range(2000))
    samples = draw_samples([text], tokenizer, 20, 32, seed=1)
    assert samples.shape == (20, 32)
    assert torch.equal(samples, draw_samples([text], tokenizer, 20, 32, seed=1))
    assert not torch.equal(samples, draw_samples([text], tokenizer, 20, 32, seed=2))
    ids = tokenize([text], tokenizer)
    chunks = {tuple(ids[i : i + 32]) for i in range(0, len(ids) - 31, 32)}
    drawn = [tuple(sample) for sample in samples.tolist()]
    assert set(drawn) <= chunks
    assert len(set(drawn)) == 20


def test_too_little_text_names_both_numbers(tokenizer):
    ids = tokenize(["one two three"], tokenizer)
    with pytest.raises(InputError, match=rf"{len(ids)} tokens are less than one sample of 64"):
        draw_samples(["one two three"], tokenizer, 4, 64, seed=0)


def test_fewer_samples_than_asked_for_are_announced(tokenizer, caplog):
    samples = draw_samples(["word " * 100], tokenizer, 1000, 16, seed=0)
    assert 1 <= len(samples) < 1000
    assert f"make {len(samples)} samples of 16, not the 1000 asked for" in caplog.text


def test_start_token_begins_every_sample(tokenizer):
    """Where the tokenizer puts a start token before a text, every sample has it, as prompts do."""
    assert start_tokens(tokenizer) == []

    class WithStart:
        bos_token_id = tokenizer.bos_token_id

        def __call__(self, text, add_special_tokens=True, verbose=True):
            ids = tokenizer(text)["input_ids"]
            return {"input_ids": [self.bos_token_id] * add_special_tokens + ids}

    samples = draw_samples(["some words " * 100], WithStart(), 4, 16, seed=0)
    assert samples.shape == (4, 16)
    assert (samples[:, 0] == tokenizer.bos_token_id).all()
    assert not (samples[:, 1:] == tokenizer.bos_token_id).any()
