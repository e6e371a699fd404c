"""Calibration samples: equal token sequences drawn from text."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch

from recalkv_vllm.compression.errors import InputError

log = logging.getLogger(__name__)

#: Text is read until there is this many times what is drawn, so that huge datasets end ...
READ_FACTOR = 2
#: ... but at least so many tokens, and twice, four times, ... as many where those are too few: what
#: has been read decides which samples are drawn, and more samples must begin with the same ones.
READ_TOKENS = 1 << 21
#: Characters that are tokenized at once.
BLOCK = 1_000_000


def tokenize(documents: Iterable[str], tokenizer, limit: int | None = None) -> list[int]:
    """Token ids of the documents joined by blank lines, without special tokens.

    Args:
        documents: text; empty documents are skipped.
        tokenizer: a Hugging Face tokenizer.
        limit: stop reading once there are this many tokens (the result may be a little longer).
    """
    ids: list[int] = []
    block: list[str] = []
    size = 0

    def flush() -> None:
        # The tokenizer's warning about sequences longer than the model's context is not meant for
        # text that is cut into samples afterwards.
        text = "\n\n".join(block) + "\n\n"
        ids.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        block.clear()

    for document in documents:
        if not document.strip():
            continue
        block.append(document)
        size += len(document)
        if size >= BLOCK:
            flush()
            size = 0
            if limit is not None and len(ids) >= limit:
                return ids
    if block:
        flush()
    return ids


def start_tokens(tokenizer) -> list[int]:
    """What the tokenizer puts before every text (a beginning-of-sequence token), or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def draw_samples(
    documents: Iterable[str], tokenizer, num_samples: int, seq_len: int, seed: int
) -> torch.Tensor:
    """Draw samples that do not overlap, in an order fixed by ``seed``.

    Each starts as the tokenizer starts every text. More samples begin with the same ones. Where the
    text has fewer than ``num_samples`` such sequences, all of them are taken and a warning is
    logged.

    Returns:
        ``[samples, seq_len]`` int64.

    Raises:
        InputError: the text is shorter than one sample.
    """
    start = start_tokens(tokenizer)
    body = seq_len - len(start)
    limit = READ_TOKENS
    while limit < READ_FACTOR * num_samples * body:
        limit *= 2
    ids = tokenize(documents, tokenizer, limit=limit)
    available = len(ids) // body
    if available == 0:
        raise InputError(
            f"calibration text: {len(ids)} tokens are less than one sample of {seq_len}; "
            "give more text or a smaller --seq-len"
        )
    if available < num_samples:
        log.warning(
            "calibration text: %d tokens make %d samples of %d, not the %d asked for; using %d",
            len(ids), available, seq_len, num_samples, available,
        )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:num_samples]
    bodies = torch.tensor(ids[: available * body]).view(available, body)[chosen]
    return torch.cat((torch.tensor(start).expand(len(chosen), -1).long(), bodies), dim=1)


def leave_out(ids: torch.Tensor) -> torch.Tensor:
    """Tokens whose loss calibration leaves out: complements of their ids, which are negative."""
    return ~ids


def token_ids(samples: torch.Tensor) -> torch.Tensor:
    """Ids of all tokens, also of those that :func:`leave_out` marks."""
    return torch.where(samples < 0, ~samples, samples)


def shares(num_samples: int, parts: int) -> list[int]:
    """``num_samples`` divided among so many parts, as equally as it goes, larger ones first."""
    return [-(-(num_samples - part) // parts) for part in range(parts)]


def interleave(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Samples of several texts in turn, until each has given all its own.

    Args:
        parts: ``[samples of the part, seq_len]`` each.

    Returns:
        ``[samples, seq_len]``.
    """
    order = sorted((row, index) for index, part in enumerate(parts) for row in range(len(part)))
    return torch.stack([parts[index][row] for row, index in order])
