"""Likelihoods by plain ``transformers``: a compressed checkpoint's dense products are its model."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from recalkv_vllm.compression.progress import track
from recalkv_vllm.compression.source import choose_device, load_model


@torch.inference_mode()
def score_windows(model: Path, windows: list[list[int]]) -> list[tuple[float, int]]:
    """Score token windows in float32.

    Returns:
        Per window: the summed negative log-likelihood of all tokens but its first, and their count.
    """
    device = choose_device("auto")
    network = load_model(model, torch.float32, device).eval()
    scores = []
    for window in track(windows, "evaluating", total=len(windows)):
        ids = torch.tensor([window], device=device)
        logits = network(ids, use_cache=False).logits[0, :-1]
        nll = F.cross_entropy(logits, ids[0, 1:], reduction="sum")
        scores.append((nll.item(), len(window) - 1))
    return scores
