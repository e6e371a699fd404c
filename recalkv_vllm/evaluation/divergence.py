"""Greedy divergence: how long two models give the same answer to an instruction."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from recalkv_vllm.evaluation.engines import Engine
from recalkv_vllm.evaluation.instructions import INSTRUCTIONS

ANSWER_TOKENS = 128


def encode_instructions(tokenizer) -> list[list[int]]:
    """Token ids of all instructions, in the tokenizer's chat template if it has one."""
    if tokenizer.chat_template is None:
        return [tokenizer.encode(f"{text}\n\n") for text in INSTRUCTIONS]
    chats = ([{"role": "user", "content": text}] for text in INSTRUCTIONS)
    texts = (
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for chat in chats
    )
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def divergence(engine: Engine, model: Path, base: Path, tokenizer) -> dict[str, Any]:
    """Compare two models' greedy answers to the same instructions, token by token.

    Returns:
        ``same``: share of answers that are the base model's to the end; ``median_tokens`` and
        ``mean_tokens`` before the first difference, or before the end where there is none;
        ``base_tokens``: mean length of the base model's answers; ``answers``, their number.
    """
    prompts = encode_instructions(tokenizer)
    limits = [ANSWER_TOKENS] * len(prompts)
    theirs, ours = (list(engine.generate(each, prompts, limits)) for each in (base, model))
    common = [common_tokens(a, b) for a, b in zip(theirs, ours, strict=True)]
    return {
        "same": sum(a == b for a, b in zip(theirs, ours, strict=True)) / len(prompts),
        "median_tokens": statistics.median(common),
        "mean_tokens": statistics.fmean(common),
        "base_tokens": statistics.fmean(map(len, theirs)),
        "answers": len(prompts),
    }


def common_tokens(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences begin with alike."""
    for i, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return i
    return min(len(a), len(b))
