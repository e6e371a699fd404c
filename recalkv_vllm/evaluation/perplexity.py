"""Perplexity over consecutive windows of a text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from recalkv_vllm.compression.base_model.devices import calibration_dtype, choose_device
from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.calibration.calibrate import draw_self
from recalkv_vllm.compression.calibration.samples import start_tokens, tokenize
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.evaluation.positions import by_position


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


def write_windows(model: BaseModel, count: int, seq_len: int, seed: int) -> list[list[int]]:
    """Windows of text that a model writes itself, as for calibration.

    Args:
        model: that writes.
        count: of windows.
        seq_len: tokens of each.
        seed: of the drawing; with that of a calibration, the text is the same.
    """
    device = choose_device("auto")
    dtype = calibration_dtype(model.dtype, device)
    return draw_self(model, dtype, device, count, seq_len, seed).tolist()


def describe_losses(what: str, losses: list[list[float]]) -> dict[str, Any]:
    """Mean negative log-likelihood (nats) per predicted token, and its exponential.

    Args:
        what: has these losses; an error's message begins so.
        losses: nats of each window's tokens but its first.

    Returns:
        ``nll``, ``perplexity``, the numbers of ``tokens`` and ``windows``, and ``positions``, as
        :func:`recalkv_vllm.evaluation.positions.by_position` gives them.

    Raises:
        InputError: they are not finite.
    """
    tokens = sum(map(len, losses))
    nll = math.fsum(each for window in losses for each in window) / tokens
    if not math.isfinite(nll):
        raise InputError(f"{what}: gives log-likelihoods that are not finite")
    return {
        "nll": nll,
        "perplexity": math.exp(nll),
        "tokens": tokens,
        "windows": len(losses),
        "positions": by_position(losses),
    }


def compare_losses(found: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """``found`` with what the base model has on the same windows, under ``base_nll`` and
    ``base_perplexity``, and ``loss``, how many nats per token more than that; both as
    :func:`describe_losses` gives them. Positions get ``base_nll``, too."""
    positions = [
        {**row, "base_nll": base_row["nll"]}
        for row, base_row in zip(found["positions"], base["positions"], strict=True)
    ]
    return {
        **found,
        "base_nll": base["nll"],
        "base_perplexity": base["perplexity"],
        "loss": found["nll"] - base["nll"],
        "positions": positions,
    }


def paired_error(losses: list[list[float]], base: list[list[float]]) -> float | None:
    """The standard error of the mean difference per token, over windows; None with one window.

    Args:
        losses: nats of each window's tokens but its first; windows are equally long.
        base: the same of the base model.
    """
    if len(losses) < 2:
        return None
    pairs = zip(losses, base, strict=True)
    differences = [statistics.fmean(ours) - statistics.fmean(theirs) for ours, theirs in pairs]
    return statistics.stdev(differences) / len(differences) ** 0.5
