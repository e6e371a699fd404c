"""Evaluation through vLLM and the paged cache, as the model is served."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# One engine, used once: in this process it starts and ends in a few seconds instead of thirty.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from vllm import LLM, RequestOutput, SamplingParams, TokensPrompt

from recalkv_vllm.checkpoint import AttentionGeometry, read_hf_config

log = logging.getLogger(__name__)

#: Prompts that the cache holds at once.
CONCURRENT_PROMPTS = 4
#: Prompts after which answers are handed out.
PROMPTS_AT_ONCE = 16
FLOAT32 = "float32"
FLOAT32_BYTES = 4
#: Tokens of a block on a CPU; elsewhere blocks are smaller.
LARGEST_BLOCK = 128


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


def _load(model: Path, length: int, dtype: str) -> LLM:
    """A model with a cache for sequences of ``length`` tokens."""
    config = read_hf_config(model)
    geometry = AttentionGeometry.from_hf_config(config)
    # The dense size is enough for every checkpoint; one more prompt pays for rounding up to blocks.
    prompt_bytes = (
        max(length, LARGEST_BLOCK) * geometry.dense_width * geometry.num_layers * FLOAT32_BYTES
    )
    cache_bytes: int | None = (CONCURRENT_PROMPTS + 1) * prompt_bytes
    if geometry.decoder_layers is not None:
        cache_bytes = None  # layers without attention have states, in pages that vLLM makes
    # vLLM multiplies most quantized weights in 16 bits only.
    served: Any = "auto" if "quantization_config" in config else dtype
    with _stdout_to_stderr():
        return LLM(
            str(model),
            dtype=served,
            enforce_eager=True,
            max_model_len=length,
            max_num_seqs=CONCURRENT_PROMPTS,
            # vLLM's default is most of the memory, and an error where it is not free.
            kv_cache_memory_bytes=cache_bytes,
        )


def _run(
    engine: LLM, prompts: list[list[int]], max_tokens: list[int], **sampling: Any
) -> list[RequestOutput]:
    """Greedy sampling of all prompts, with further options of vLLM's sampling."""
    with _stdout_to_stderr():
        return engine.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids in prompts],
            [SamplingParams(temperature=0, max_tokens=limit, **sampling) for limit in max_tokens],
            use_tqdm=log.isEnabledFor(logging.INFO),
        )


def score_windows(model: Path, windows: list[list[int]], dtype: str = FLOAT32) -> list[list[float]]:
    """See :class:`recalkv_vllm.evaluation.engines.Engine`."""
    # vLLM always generates a token after the prompt.
    engine = _load(model, max(map(len, windows)) + 1, dtype)
    outputs = _run(engine, windows, [1] * len(windows), prompt_logprobs=0)
    scores = []
    for window, output in zip(windows, outputs, strict=True):
        # The first token has no prediction; each other position holds the prompt's own token.
        logprobs: Any = output.prompt_logprobs
        found = logprobs[1:]
        scores.append([-at[token].logprob for token, at in zip(window[1:], found, strict=True)])
    return scores


def generate(
    model: Path, prompts: list[list[int]], max_tokens: list[int], dtype: str = FLOAT32
) -> Iterator[list[int]]:
    """See :class:`recalkv_vllm.evaluation.engines.Engine`."""
    lengths = (len(ids) + limit for ids, limit in zip(prompts, max_tokens, strict=True))
    engine = _load(model, max(lengths), dtype)
    for i in range(0, len(prompts), PROMPTS_AT_ONCE):
        part = slice(i, i + PROMPTS_AT_ONCE)
        for output in _run(engine, prompts[part], max_tokens[part]):
            yield list(output.outputs[0].token_ids)
