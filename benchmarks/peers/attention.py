"""Attention of plain ``transformers`` models over what a peer's cache gives back."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from recalkv_vllm.compression.base_model.attention import CausalLM
from recalkv_vllm.compression.errors import InputError

from .peer import Peer, Window

NAME = "recalkv_peers"
#: Queries whose scores are in memory at once.
QUERIES = 256


@contextmanager
def peer_attention(network: CausalLM, peer: Peer) -> Iterator[None]:
    """Within it, the model's attention reads the peer's cache."""
    with _attention(network, functools.partial(_attend, peer)):
        yield


@contextmanager
def observed_attention(network: CausalLM, peers: Sequence[Peer]) -> Iterator[None]:
    """Within it, the model is dense, and the peers observe every layer's attention."""
    with _attention(network, functools.partial(_observe, peers)):
        yield


@contextmanager
def _attention(network: CausalLM, function: Any) -> Iterator[None]:
    before = network.config._attn_implementation
    AttentionInterface.register(NAME, function)
    network.set_attn_implementation(NAME)
    try:
        yield
    finally:
        network.set_attn_implementation(before)


def _attend(
    peer: Peer,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """``transformers``' attention function, of one sequence: ``[1, heads, tokens, d]`` each."""
    if sliding_window is not None and sliding_window < key.shape[2]:
        raise InputError(f"model: expected full attention, found windows of {sliding_window}")
    layer, exact = module.layer_idx, (key[0], value[0])
    rounded = peer.keys(layer, key[0]), peer.values(layer, value[0])
    windows = peer.key_window, peer.value_window
    return attention(query[0], exact, rounded, windows, scaling).transpose(0, 1)[None], None


def _observe(
    peers: Sequence[Peer],
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    dense = (key[0], value[0])
    outputs = attention(query[0], dense, dense, (Window(), Window()), scaling)
    for peer in peers:
        peer.observe(module.layer_idx, query[0], *dense, outputs)
    return outputs.transpose(0, 1)[None], None


def attention(
    queries: torch.Tensor,
    exact: tuple[torch.Tensor, torch.Tensor],
    rounded: tuple[torch.Tensor, torch.Tensor],
    windows: tuple[Window, Window],
    scaling: float,
) -> torch.Tensor:
    """Causal attention, every query as if it were the last of a cache at that time.

    Args:
        queries: ``[h_q, tokens, d]``.
        exact: keys and values, ``[h_kv, tokens, d]``.
        rounded: what the cache gives back of them.
        windows: the tokens whose keys, and whose values, a query reads exactly.
        scaling: of the scores.

    Returns:
        ``[h_q, tokens, d]``.
    """
    if all(window.empty for window in windows):
        parts = (part[None] for part in (queries, *rounded))
        out = F.scaled_dot_product_attention(*parts, is_causal=True, scale=scaling, enable_gqa=True)
        return out[0]
    repeats, tokens = len(queries) // len(exact[0]), queries.shape[1]
    k, v, k_rounded, v_rounded = (
        part.repeat_interleave(repeats, dim=0) for part in (*exact, *rounded)
    )
    position = torch.arange(tokens, device=queries.device)
    outputs = []
    for some, at in zip(queries.split(QUERIES, dim=1), position.split(QUERIES), strict=True):
        keys_exact, values_exact = (window.exact(at, tokens) for window in windows)
        scores = torch.where(keys_exact, some @ k.mT, some @ k_rounded.mT) * scaling
        weights = scores.masked_fill(position > at[:, None], -torch.inf).softmax(-1)
        old = weights.masked_fill(values_exact, 0)
        outputs.append((weights - old) @ v + old @ v_rounded)
    return torch.cat(outputs, dim=1)
