"""Strings that are stated twice: to the letter, in many forms, the same for the same seed."""

import json
import re
from random import Random

import pytest
import torch

from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.calibration import recall_records
from recalkv_vllm.compression.calibration.recall_records import draw_document
from recalkv_vllm.compression.calibration.recall_text import draw_recall, recall_documents
from recalkv_vllm.compression.calibration.samples import token_ids

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
)


def documents(form, count=50):
    rngs = map(Random, range(count))
    return [form(rng, rng.randint(3, 12)) for rng in rngs]


@pytest.mark.parametrize("form", [recall_records._lines, recall_records._numbered])
def test_lines_are_stated_again_in_some_order(form):
    for document in documents(form):
        lines = document.statement.splitlines()
        assert sorted(lines) == sorted(document.restatement.splitlines())
        assert len(set(lines)) == len(lines) >= 3


def test_answers_are_what_was_stated():
    for document in documents(recall_records._questions):
        stated = dict(re.findall(r"- (.*) \((.*)\)", document.statement))
        answers = re.findall(r"To (.*) belongs (.*)", document.restatement)
        assert 2 <= len(answers) == len(document.restatement.splitlines())
        assert all(stated[key] == value for key, value in answers)
        assert document.request == f"What belongs to {', '.join(key for key, _ in answers)}?"


def test_objects_are_stated_again_in_some_order():
    for document in documents(recall_records._objects):
        again = list(map(json.loads, document.restatement.splitlines()))
        stated = json.loads(document.statement)
        assert sorted(map(repr, map(sorted_items, stated))) == sorted(
            map(repr, map(sorted_items, again))
        )


def sorted_items(row):
    return sorted(row.items())


def test_copies_are_exact():
    for document in documents(recall_records._copy):
        assert document.statement == document.restatement


def test_documents_are_of_all_forms_and_seldom_alike():
    drawn = [draw_document(Random(seed), 8) for seed in range(300)]
    assert len({document.statement for document in drawn}) == len(drawn)
    plain = {document.request for document in drawn if not document.request.startswith("What")}
    assert len(plain) == len(recall_records.FORMS) - 1


def test_samples_follow_the_seed_and_more_begin_with_the_same_ones(tokenizer):
    few = draw_recall(tokenizer, 4, 256, seed=1)
    assert few.shape == (4, 256)
    assert few.dtype == torch.int64
    assert torch.equal(draw_recall(tokenizer, 9, 256, seed=1)[:4], few)
    assert not (draw_recall(tokenizer, 4, 256, seed=2) == few).all(dim=1).any()


def test_what_counts_has_been_stated_before(tiny):
    """Word by word, but for the words of an answer; in every sample there is some."""
    tokenizer = BaseModel(tiny).tokenizer()
    tokenizer.chat_template = TEMPLATE
    for sample in draw_recall(tokenizer, 20, 2048, seed=0):
        counted = (sample >= 0).nonzero().flatten()
        assert len(counted) > 200
        stated = tokenizer.decode(token_ids(sample[: counted[-1] + 1]))
        for part in torch.tensor_split(counted, (counted.diff() > 1).nonzero().flatten() + 1):
            words = re.findall(r"[^\s\"{},:]+", tokenizer.decode(sample[part]))
            missing = [word for word in words if stated.count(word) < 2]
            assert not set(missing) - {"To", "belongs"}


def test_half_of_the_documents_are_chat_where_there_is_a_template(tiny):
    tokenizer = BaseModel(tiny).tokenizer()

    def share_of_chat():
        texts = recall_documents(tokenizer, 512, Random(0))
        return sum(next(texts)[0].startswith("[user] ") for _ in range(400)) / 400

    tokenizer.chat_template = None
    assert share_of_chat() == 0
    tokenizer.chat_template = TEMPLATE
    assert 0.4 < share_of_chat() < 0.6


def test_longer_samples_have_longer_documents(tiny):
    tokenizer = BaseModel(tiny).tokenizer()

    def longest(seq_len):
        texts = recall_documents(tokenizer, seq_len, Random(0))
        return max(next(texts)[0].count("\n") for _ in range(200))

    assert longest(2048) > 2 * longest(256)


def test_samples_begin_as_the_tokenizer_begins_texts(tokenizer, monkeypatch):
    start = tokenizer.bos_token_id
    monkeypatch.setattr(
        "recalkv_vllm.compression.calibration.recall_text.start_tokens", lambda _: [start]
    )
    samples = token_ids(draw_recall(tokenizer, 3, 64, seed=0))
    assert (samples[:, 0] == start).all()
    assert not (samples[:, 1:] == start).any()
