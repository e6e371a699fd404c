"""Evaluation by plain ``transformers``: a compressed checkpoint's dense products are its model,
with its latents rounded as the cache does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from recalkv_vllm.compression.base_model.attention import CausalLM
from recalkv_vllm.compression.base_model.devices import choose_device
from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.progress import track
from recalkv_vllm.evaluation.latent_rounding import round_latents


def load_served(model: Path) -> CausalLM:
    """The model in float32, its keys and values as they are when it is served."""
    network = BaseModel(model).load(torch.float32, choose_device("auto")).eval()
    round_latents(network, model)
    return network


def score_windows(model: Path, windows: list[list[int]]) -> list[list[float]]:
    """See :class:`recalkv_vllm.evaluation.engines.Engine`."""
    return score(load_served(model), windows)


@torch.no_grad()
def score(network: CausalLM, windows: list[list[int]]) -> list[list[float]]:
    """As :func:`score_windows`, of a model that is loaded."""
    scores = []
    for window in track(windows, "evaluating", total=len(windows)):
        ids = torch.tensor([window], device=network.device)
        logits = network(ids, use_cache=False).logits[0, :-1]
        scores.append(F.cross_entropy(logits, ids[0, 1:], reduction="none").tolist())
    return scores


@torch.inference_mode()
def generate(model: Path, prompts: list[list[int]], max_tokens: list[int]) -> Iterator[list[int]]:
    """See :class:`recalkv_vllm.evaluation.engines.Engine`."""
    network = load_served(model)
    jobs = zip(prompts, max_tokens, strict=True)
    for prompt, limit in track(jobs, "generating", total=len(prompts)):
        ids = torch.tensor([prompt], device=network.device)
        out = network.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False
        )
        yield out[0, len(prompt) :].tolist()
