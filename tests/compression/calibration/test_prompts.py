"""Prompts of the texts that a model writes: every kind in turn, as the tokenizer begins a text."""

from itertools import islice

import pytest

from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.calibration.prompt_texts import (
    CODE_OPENINGS,
    PROSE_OPENINGS,
    REQUESTS,
)
from recalkv_vllm.compression.calibration.prompts import Prompts

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def tiny_tokenizer(tiny):
    return BaseModel(tiny).tokenizer()


def test_kinds_and_prompts_take_turns():
    prompts = Prompts((((0,), (1,), (2,)), ((10,), (11,)), ((20,),)), None)
    firsts = [next(prompts.of_row(index, 4)) for index in range(9)]
    assert firsts == [(0,), (10,), (20,), (1,), (11,), (20,), (2,), (10,), (20,)]
    assert list(islice(prompts.of_row(4, 4), 4)) == [(11,), (20,), (1,), (11,)]


def test_separator_is_before_every_text_but_the_first():
    prompts = Prompts((((0, 1),), ((2,),)), None, separator=(9, 9))
    assert list(islice(prompts.of_row(0, 1), 3)) == [(0, 1), (9, 9, 2), (9, 9, 0, 1)]


def test_openings_alone_without_a_chat_template(tiny_tokenizer):
    code, prose = Prompts.of(tiny_tokenizer).kinds
    assert [tiny_tokenizer.decode(prompt) for prompt in code] == list(CODE_OPENINGS)
    assert len(prose) == len(PROSE_OPENINGS)
    assert prose[PROSE_OPENINGS.index("")] == (tiny_tokenizer.bos_token_id,)


def test_requests_with_a_chat_template(tiny_tokenizer):
    tiny_tokenizer.chat_template = TEMPLATE
    chat = Prompts.of(tiny_tokenizer).kinds[2]
    expected = [f"[user] {request}\n[assistant] " for request in REQUESTS]
    assert [tiny_tokenizer.decode(prompt) for prompt in chat] == expected


def test_prompts_are_all_different_and_short(tiny_tokenizer):
    tiny_tokenizer.chat_template = TEMPLATE
    for kind in Prompts.of(tiny_tokenizer).kinds:
        assert len(set(kind)) == len(kind)
        assert all(prompt and len(prompt) < 128 for prompt in kind)


def test_prompts_begin_as_the_tokenizer_begins_texts(tiny_tokenizer, monkeypatch):
    assert tiny_tokenizer.decode(Prompts.of(tiny_tokenizer).separator) == "\n\n"
    start = tiny_tokenizer.bos_token_id
    monkeypatch.setattr(
        "recalkv_vllm.compression.calibration.prompts.start_tokens", lambda _: [start]
    )
    prompts = Prompts.of(tiny_tokenizer)
    assert {prompt[0] for kind in prompts.kinds for prompt in kind} == {start}
    assert not prompts.separator
