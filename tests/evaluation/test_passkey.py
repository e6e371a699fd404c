from __future__ import annotations

from pathlib import Path

import pytest

from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.evaluation.passkey import FILLER, build_prompt, passkey


@pytest.mark.parametrize("length", [450, 700, 1500])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_prompt_has_its_length_and_the_needle_at_its_depth(tokenizer, length, depth):
    prompt = build_prompt(tokenizer, length, depth, 54321)
    text = tokenizer.decode(prompt)
    assert length - len(tokenizer.encode(FILLER)) - 2 <= len(prompt) <= length
    before, after = text.split("The pass key is 54321. Remember it.")
    total = text.count(FILLER.strip())
    assert before.count(FILLER.strip()) == round(depth * total)
    assert text.endswith("What is the pass key? The pass key is")
    assert after.count("54321") == 1


def test_too_short_a_prompt_is_refused(tokenizer):
    with pytest.raises(InputError, match="--lengths 60: expected more than"):
        build_prompt(tokenizer, 60, 0.5, 12345)


class Reader:
    """An engine that finds keys in the first half of a prompt only."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def generate(self, model, prompts, max_tokens):
        answers = []
        for prompt in prompts:
            text = self.tokenizer.decode(prompt)
            at = text.index("The pass key is ") + len("The pass key is ")
            found = text[at : at + 5] if at < len(text) / 2 else "nothing"
            answers.append(self.tokenizer.encode(f" {found}."))
        return answers


def test_grid(tokenizer):
    grid = ([500, 900], [0.0, 1.0], 3, 7)
    result = passkey(Reader(tokenizer), Path("model"), tokenizer, *grid)
    assert result["accuracy"] == 0.5
    assert result["prompts"] == 12
    cells = {(row["length"], row["depth"]): row["accuracy"] for row in result["rows"]}
    assert cells == {(500, 0.0): 1, (500, 1.0): 0, (900, 0.0): 1, (900, 1.0): 0}
    assert result == passkey(Reader(tokenizer), Path("model"), tokenizer, *grid)
    with pytest.raises(InputError, match=r"--depths 1\.5: expected a number from 0 to 1"):
        passkey(Reader(tokenizer), Path("model"), tokenizer, [500], [1.5], 1, 0)
