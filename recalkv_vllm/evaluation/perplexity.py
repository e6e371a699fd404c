"""Perplexity over consecutive windows of a text, by an engine."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recalkv_vllm.compression.calibration.samples import start_tokens, tokenize
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.evaluation.engines import Engine


def cut_windows(
    documents: Iterable[str], tokenizer, seq_len: int, max_tokens: int | None = None
) -> list[list[int]]:
    """Consecutive windows of ``seq_len`` tokens that do not overlap; an incomplete last is dropped.

    The text begins with the tokenizer's start token, if it has one; later windows do not.

    Args:
        documents: the text.
        tokenizer: a Hugging Face tokenizer.
        seq_len: tokens per window.
        max_tokens: use no more than this many tokens of the text.

    Raises:
        InputError: there is not one whole window.
    """
    ids = start_tokens(tokenizer) + tokenize(documents, tokenizer, limit=max_tokens)
    ids = ids[:max_tokens]
    count = len(ids) // seq_len
    if count == 0:
        raise InputError(
            f"evaluation text: {len(ids)} tokens are less than one window of {seq_len}; "
            "give more text, a larger --max-tokens or a smaller --seq-len"
        )
    return [ids[i * seq_len : (i + 1) * seq_len] for i in range(count)]


def perplexity(engine: Engine, model: Path, windows: list[list[int]]) -> dict[str, Any]:
    """Mean negative log-likelihood (nats) per predicted token, and its exponential.

    Raises:
        InputError: the model's likelihoods are not finite.
    """
    return mean_nll(engine.score_windows(model, windows), f"model {model}")


def mean_nll(scores: list[tuple[float, int]], what: str) -> dict[str, Any]:
    """The mean over all windows of their summed negative log-likelihoods and counts of tokens.

    Raises:
        InputError: it is not finite; the message begins with ``what``.
    """
    tokens = sum(count for _, count in scores)
    nll = math.fsum(total for total, _ in scores) / tokens
    if not math.isfinite(nll):
        raise InputError(f"{what}: gives log-likelihoods that are not finite")
    return {"nll": nll, "perplexity": math.exp(nll), "tokens": tokens, "windows": len(scores)}
