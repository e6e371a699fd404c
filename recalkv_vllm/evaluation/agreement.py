"""How far a compressed model's predictions are from its base model's, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.progress import track
from recalkv_vllm.evaluation.transformers_engine import load_served


@torch.inference_mode()
def agreement(model: Path, base: Path, windows: list[list[int]]) -> dict[str, Any]:
    """Compare next-token distributions of two models on the same windows, in float32.

    Returns:
        ``top1``: share of positions where both find the same token most likely; ``kl``: mean
        KL(base ‖ model) in nats; ``nll`` and ``base_nll``; ``tokens`` that were predicted.

    Raises:
        InputError: different vocabularies, or predictions that are not finite.
    """
    ours, theirs = load_served(model), load_served(base)
    sizes = [network.config.vocab_size for network in (ours, theirs)]
    if sizes[0] != sizes[1]:
        raise InputError(f"--base {base}: expected a vocabulary of {sizes[0]}, found {sizes[1]}")
    sums = torch.zeros(4, dtype=torch.float64)
    tokens = 0
    for window in track(windows, "comparing", total=len(windows)):
        ids = torch.tensor([window], device=ours.device)
        log_p, log_q = (
            F.log_softmax(network(ids, use_cache=False).logits[0, :-1].float(), dim=-1)
            for network in (theirs, ours)
        )
        target = ids[0, 1:, None]
        parts = (
            log_p.argmax(-1) == log_q.argmax(-1),
            F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1),
            -log_q.gather(1, target),
            -log_p.gather(1, target),
        )
        sums += torch.stack([part.double().sum().cpu() for part in parts])
        tokens += len(window) - 1
    if not sums.isfinite().all():
        raise InputError(f"model {model}: gives log-likelihoods that are not finite")
    names = ("top1", "kl", "nll", "base_nll")
    return {**dict(zip(names, (sums / tokens).tolist(), strict=True)), "tokens": tokens}
