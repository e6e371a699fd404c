"""Kernels are warmed up when vLLM's runners have bound the last cache."""

import logging
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.worker.utils import bind_kv_cache_to_layers, clear_layer_kv_caches

from recalkv_vllm.serving.attention import layer as attention_layer
from recalkv_vllm.serving.attention.layer import LatentAttention

NAMES = [f"model.layers.{i}.self_attn.attn" for i in range(3)]


@pytest.fixture
def layers(monkeypatch) -> dict[str, LatentAttention]:
    """Layers of one model beside one of another kind, as vLLM knows them."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.bfloat16, max_model_len=4096),
        scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=64),
        speculative_config=None,
        compilation_config=SimpleNamespace(static_forward_context={"draft": object()}),
    )
    monkeypatch.setattr(attention_layer, "get_current_vllm_config", lambda: config)
    for name in NAMES:
        LatentAttention(4, 64, 1.0, 128, None, None, 0, prefix=name)
    context = config.compilation_config.static_forward_context
    return {name: context[name] for name in NAMES}


@pytest.fixture
def warmed(layers, monkeypatch) -> list[tuple[str, int]]:
    """``(layer, blocks of its cache)`` of every layer that was warmed up; launches five each."""
    calls = []
    for name, layer in layers.items():

        def warm_up(kv_cache, name=name):
            calls.append((name, kv_cache.shape[0]))
            return 5

        monkeypatch.setattr(layer.impl, "warm_up", warm_up)
    return calls


def bind(layers, blocks):
    caches = {name: torch.zeros(blocks, 1, 16, 128) for name in reversed(NAMES)}
    bind_kv_cache_to_layers(caches, layers)


def test_once_for_all_layers_and_again_for_other_caches(layers, warmed, caplog):
    with caplog.at_level(logging.INFO, "recalkv_vllm"):
        bind(layers, 2)  # as while memory is profiled
        assert warmed == [(name, 2) for name in NAMES]
        clear_layer_kv_caches(layers.values())
        bind(layers, 64)
    assert warmed[3:] == [(name, 64) for name in NAMES]
    assert len(caplog.records) == 2
    for record in caplog.records:
        assert record.message.startswith("recalkv: kernels are compiled: 15 launches in ")


def test_not_before_the_last_cache_is_there(layers, warmed):
    for name in NAMES[:-1]:
        bind_kv_cache_to_layers({name: torch.zeros(2, 1, 16, 128)}, layers)
    assert warmed == []


def test_nothing_is_said_where_nothing_is_compiled(layers, monkeypatch, caplog):
    for layer in layers.values():
        monkeypatch.setattr(layer.impl, "warm_up", lambda kv_cache: 0)
    with caplog.at_level(logging.INFO, "recalkv_vllm"):
        bind(layers, 2)
    assert caplog.records == []
