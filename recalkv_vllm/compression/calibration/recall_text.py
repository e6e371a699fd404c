"""Calibration text of strings that are stated twice, so that statistics see verbatim recall."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from random import Random

import torch

from recalkv_vllm.compression.calibration.recall_records import Document, draw_document
from recalkv_vllm.compression.calibration.samples import leave_out, start_tokens

#: Tokens of a sample for each record that a document may have, so that several fit a sample.
TOKENS_PER_RECORD = 64
LEAST_RECORDS = 4
#: Documents that are tried until one fits what is left of a sample; the last one is cut off.
TRIES = 8


def draw_recall(tokenizer, num_samples: int, seq_len: int, seed: int) -> torch.Tensor:
    """Samples of documents that follow one another, made from random numbers alone.

    Every sample begins as the tokenizer starts every text, and with a document. Half of the
    documents are a request and its answer where there is a chat template. Only what is stated again
    counts: the rest cannot be known, and its gradients would drown all others.

    Args:
        tokenizer: a Hugging Face tokenizer.
        num_samples: more samples begin with the same ones.
        seq_len: tokens of a sample.
        seed: of the random numbers.

    Returns:
        Token ids ``[num_samples, seq_len]``, int64; those that are not stated again are left out of
        the loss (:func:`..samples.leave_out`).
    """

    def ids(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]).long()

    def tokens(parts: tuple[str, str, str]) -> torch.Tensor:
        before, again, after = map(ids, parts)
        return torch.cat((leave_out(before), again, leave_out(after)))

    samples = []
    for index in range(num_samples):
        sample = torch.tensor(start_tokens(tokenizer)).long()
        documents = map(tokens, recall_documents(tokenizer, seq_len, Random(f"{seed} {index}")))
        while len(sample) < seq_len:
            for document in islice(documents, TRIES):
                if len(sample) + len(document) <= seq_len:
                    break
            sample = torch.cat((sample, document))
        samples.append(sample[:seq_len])
    return torch.stack(samples)


def recall_documents(tokenizer, seq_len: int, rng: Random) -> Iterator[tuple[str, str, str]]:
    """Documents without end: what is before that which is stated again, that, and what is after.

    They are longer for a longer ``seq_len``.
    """
    most_records = max(LEAST_RECORDS, seq_len // TOKENS_PER_RECORD)
    while True:
        document = draw_document(rng, most_records)
        chat = tokenizer.chat_template and rng.random() < 0.5
        yield _chat(tokenizer, document) if chat else _plain(document, rng)


def _plain(document: Document, rng: Random) -> tuple[str, str, str]:
    request = rng.choice((f"{document.request}\n", "", ""))
    return f"{document.statement}\n\n{request}", document.restatement, "\n\n"


def _chat(tokenizer, document: Document) -> tuple[str, str, str]:
    messages = [
        {"role": "user", "content": f"{document.request}\n\n{document.statement}"},
        {"role": "assistant", "content": document.restatement},
    ]
    # As text: a template begins with the start token itself, where there is one.
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return text.rpartition(document.restatement)
