"""Attention over a peer's cache: which tokens are exact for which query."""

from __future__ import annotations

import pytest
import torch

from recalkv_vllm.benchmarks.peers.attention import attention, peer_attention
from recalkv_vllm.benchmarks.peers.kivi import Kivi
from recalkv_vllm.benchmarks.peers.measure import peer_losses
from recalkv_vllm.benchmarks.peers.peer import Peer, Window
from recalkv_vllm.checkpoint import AttentionGeometry, read_hf_config
from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.evaluation.transformers_engine import load_served, score


class Exact(Peer):
    """A cache that rounds nothing."""

    def keys(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        return keys

    values = keys


class Nothing(Peer):
    """A cache that keeps only what is in its windows."""

    key_window = value_window = Window(recent=1000)

    def keys(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        return torch.full_like(keys, torch.nan)

    def values(self, layer: int, values: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(values)


@pytest.fixture(scope="module")
def network(tiny):
    return load_served(tiny)


@pytest.fixture(scope="module")
def geometry(tiny):
    return AttentionGeometry.from_hf_config(read_hf_config(tiny))


@pytest.fixture
def text() -> list[list[int]]:
    ids = torch.randint(512, (2, 150), generator=torch.Generator().manual_seed(0))
    return ids.tolist()


def kivi_by_algorithm_1(tokens: int, residual: int) -> tuple[list[int], list[int]]:
    """How many keys and values are rounded after each token, by appending one at a time."""
    keys, values, recent_keys, recent_values = 0, 0, 0, 0
    rounded_keys, rounded_values = [], []
    for _ in range(tokens):
        recent_keys += 1
        if recent_keys == residual:
            keys, recent_keys = keys + residual, 0
        recent_values += 1
        if recent_values > residual:
            values, recent_values = values + 1, residual
        rounded_keys.append(keys)
        rounded_values.append(values)
    return rounded_keys, rounded_values


def test_windows_of_kivi() -> None:
    tokens, residual = 200, 32
    peer = Kivi(AttentionGeometry(1, 64, 1, 1, 64), bits=2, residual=residual)
    at = torch.arange(tokens)
    found = [
        (~window.exact(at, tokens)).sum(1).tolist()
        for window in (peer.key_window, peer.value_window)
    ]
    assert found == list(kivi_by_algorithm_1(tokens, residual))


def test_rounded_tokens_are_the_oldest_after_the_sink() -> None:
    exact = Window(sink=2, recent=3).exact(torch.tensor([0, 4, 7]), 8)
    assert exact.int().tolist() == [
        [1, 1, 1, 1, 1, 1, 1, 1],  # also what causality hides
        [1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 0, 0, 0, 1, 1, 1],
    ]


@pytest.mark.parametrize(
    "window", [Window(), Window(step=16), Window(recent=20), Window(sink=4, recent=8, step=4)]
)
def test_share_is_a_mean_over_steps(window: Window) -> None:
    tokens = 320
    last = torch.arange(tokens - window.step, tokens)  # every phase of a step
    causal = torch.arange(tokens) <= last[:, None]
    count = (window.exact(last, tokens) & causal).sum(1).double().mean().item()
    assert window.share(tokens) == pytest.approx(count / tokens)
    assert window.share(1) <= 1


@pytest.mark.parametrize(
    "windows",
    [
        (Window(), Window()),
        (Window(step=8), Window(recent=8)),
        (Window(sink=3, recent=5), Window(sink=3, recent=5)),
        (Window(), Window(recent=1)),
    ],
)
def test_every_query_is_the_last_of_a_cache(windows: tuple[Window, Window]) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, scaling = 300, 0.3  # more than one block of queries
    queries = torch.randn(6, tokens, 8, generator=generator)
    exact, rounded = torch.randn(2, 2, 2, tokens, 8, generator=generator)
    found = attention(queries, tuple(exact), tuple(rounded), windows, scaling)
    for t in (0, 1, 7, 8, 36, 255, 256, 299):
        at = torch.tensor([t])
        k, v = (
            torch.where(window.exact(at, tokens)[0, : t + 1, None], e[:, : t + 1], r[:, : t + 1])
            for window, e, r in zip(windows, exact.double(), rounded.double(), strict=True)
        )
        k, v = (part.repeat_interleave(3, dim=0) for part in (k, v))
        weights = (torch.einsum("hd,htd->ht", queries[:, t].double(), k) * scaling).softmax(-1)
        expected = torch.einsum("ht,htd->hd", weights, v)
        assert torch.allclose(found[:, t].double(), expected, atol=1e-5)


def assert_same(found: list[list[float]], expected: list[list[float]]) -> None:
    for losses, dense in zip(found, expected, strict=True):
        assert losses == pytest.approx(dense, rel=1e-3, abs=1e-4)


def test_a_cache_that_rounds_nothing_is_dense(network, geometry, text) -> None:
    dense = score(network, text)
    assert_same(peer_losses(network, Exact(geometry), text), dense)
    assert score(network, text) == dense


def test_windows_longer_than_the_text_are_dense(network, geometry, text) -> None:
    assert_same(peer_losses(network, Nothing(geometry), text), score(network, text))


def test_models_of_sliding_windows_are_refused(make_model) -> None:
    model = BaseModel(make_model("mistral", sliding_window=64)).load(torch.float32, "cpu").eval()
    geometry = AttentionGeometry.from_hf_config(model.config.to_dict())
    with (
        peer_attention(model, Exact(geometry)),
        pytest.raises(InputError, match="expected full attention, found windows of 64"),
    ):
        model(torch.zeros(1, 100, dtype=torch.long))
