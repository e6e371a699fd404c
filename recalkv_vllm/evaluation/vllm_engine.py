"""Likelihoods through vLLM and the paged cache: prompt log-probabilities of the served model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# One engine, used once: in this process it starts and ends in a few seconds instead of thirty.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from vllm import LLM, SamplingParams

from recalkv_vllm.checkpoint import AttentionGeometry, read_hf_config

#: Windows that the cache holds at once.
CONCURRENT_WINDOWS = 4
FLOAT32_BYTES = 4


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """vLLM logs to stdout; ours is for the result."""
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def score_windows(model: Path, windows: list[list[int]]) -> list[tuple[float, int]]:
    """Score token windows in float32, with the attention that the model is served with.

    Returns:
        Per window: the summed negative log-likelihood of all tokens but its first, and their count.
    """
    geometry = AttentionGeometry.from_hf_config(read_hf_config(model))
    # vLLM always generates a token after the prompt.
    length = max(map(len, windows)) + 1
    # The dense size is enough for every checkpoint; one more window pays for rounding up to blocks.
    window_bytes = length * geometry.dense_width * geometry.num_layers * FLOAT32_BYTES
    with _stdout_to_stderr():
        engine = LLM(
            str(model),
            dtype="float32",
            enforce_eager=True,
            max_model_len=length,
            max_num_seqs=CONCURRENT_WINDOWS,
            # vLLM's default is most of the memory, and an error where it is not free.
            kv_cache_memory_bytes=(CONCURRENT_WINDOWS + 1) * window_bytes,
        )
        outputs = engine.generate(
            [{"prompt_token_ids": window} for window in windows],
            SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0),
        )
    scores = []
    for window, output in zip(windows, outputs, strict=True):
        # The first token has no prediction; each other position holds the prompt's own token.
        found = output.prompt_logprobs[1:]
        likelihoods = [at[token].logprob for token, at in zip(window[1:], found, strict=True)]
        scores.append((-sum(likelihoods), len(likelihoods)))
    return scores
