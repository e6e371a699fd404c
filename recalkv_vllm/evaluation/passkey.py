"""Retrieval of a number hidden in long text: made here, nothing is downloaded.

A prompt of a given length repeats filler sentences, with "The pass key is N" at a given depth, and
asks for N at its end (passkey retrieval as in Landmark Attention, arXiv 2305.16300).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.evaluation.engines import Engine

TASK = (
    "There is important information hidden inside a lot of irrelevant text. Find it and memorise "
    "it.\n\n"
)
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = "\n\nWhat is the pass key?"
ANSWER = "The pass key is"
ANSWER_TOKENS = 8


def build_prompt(tokenizer, length: int, depth: float, key: int) -> list[int]:
    """Token ids of a prompt of at most ``length`` tokens, as long as whole filler sentences allow.

    Args:
        tokenizer: a Hugging Face tokenizer; its chat template is used if it has one.
        length: of the prompt.
        depth: where the needle is: 0 before all filler, 1 after it.
        key: the number.

    Raises:
        InputError: ``length`` does not hold even one filler sentence.
    """

    def encode(repeats: int) -> list[int]:
        before = round(depth * repeats)
        text = TASK + FILLER * before + NEEDLE.format(key=key) + FILLER * (repeats - before)
        if tokenizer.chat_template is None:
            return tokenizer.encode(f"{text}{QUESTION} {ANSWER}")
        chat = [{"role": "user", "content": text + QUESTION}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return tokenizer.encode(prompt + ANSWER, add_special_tokens=False)

    least = len(encode(0))
    each = max(1, len(encode(8)) - least) / 8
    repeats = int((length - least) / each)
    while repeats > 0 and len(encode(repeats)) > length:
        repeats -= 1
    if repeats < 1:
        raise InputError(f"--lengths {length}: expected more than {least + int(each)} tokens")
    return encode(repeats)


def passkey(
    engine: Engine,
    model: Path,
    tokenizer,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """Share of keys found, over all prompts and for every length and depth.

    Raises:
        InputError: a length or depth out of range.
    """
    for depth in depths:
        if not 0 <= depth <= 1:
            raise InputError(f"--depths {depth}: expected a number from 0 to 1")
    draw = random.Random(seed)
    cells = list(itertools.product(lengths, depths))
    keys = [[draw.randrange(10_000, 100_000) for _ in range(samples)] for _ in cells]
    prompts = [
        build_prompt(tokenizer, length, depth, key)
        for (length, depth), row in zip(cells, keys, strict=True)
        for key in row
    ]
    answers = iter(engine.generate(model, prompts, ANSWER_TOKENS))
    rows = []
    for (length, depth), row in zip(cells, keys, strict=True):
        found = [str(key) in tokenizer.decode(next(answers)) for key in row]
        rows.append({"length": length, "depth": depth, "accuracy": sum(found) / samples})
    accuracy = sum(row["accuracy"] for row in rows) / len(rows)
    return {"accuracy": accuracy, "prompts": len(prompts), "rows": rows}
