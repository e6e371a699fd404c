"""Calibration text that the model writes itself: for when there is none like what it will read."""

from __future__ import annotations

import logging

import torch
from transformers import GenerationConfig

from recalkv_vllm.compression.base_model.attention import CausalLM
from recalkv_vllm.compression.errors import InputError

log = logging.getLogger(__name__)

SELF = "self"
#: Sequences that are sampled together.
BATCH = 32


def sample_self(
    model: CausalLM, tokenizer, num_samples: int, seq_len: int, seed: int
) -> torch.Tensor:
    """Sample from the model's own distribution (temperature 1, nothing cut off).

    Every sequence starts with the token that begins a text, or else with the one that ends it, as
    between texts in training. Sequences do not end early: an end is never drawn.

    Returns:
        ``[num_samples, seq_len]`` int64, on the CPU; the same for the same ``seed`` and machine.

    Raises:
        InputError: the tokenizer has no such token.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise InputError(f"--dataset {SELF}: the tokenizer has no token that begins or ends a text")
    generation = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        min_new_tokens=seq_len - 1,
        max_new_tokens=seq_len - 1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=start,
    )
    batches = []
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        for first in range(0, num_samples, BATCH):
            count = min(BATCH, num_samples - first)
            log.info("sampling text: %d of %d", first, num_samples)
            prompt = torch.full((count, 1), start, device=model.device)
            batches.append(
                model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=generation,
                ).cpu()
            )
    return torch.cat(batches)
