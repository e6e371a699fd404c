"""Layers with and without windows: cache groups, tokens of the weights, and no byte of padding."""

import pytest

from recalkv_vllm.band_format import token_bytes
from recalkv_vllm.checkpoint import AttentionGeometry, RecalkvConfig, read_hf_config
from recalkv_vllm.compression.methods.kfac_bands import budget_bytes
from tests.e2e.conftest import run_engines

STOCK = {"hf_overrides": {"architectures": ["Gemma3ForCausalLM"]}}
CACHE_BYTES, BLOCK = 64 << 20, 32


def layers_of(checkpoint):
    return RecalkvConfig.from_hf_config(read_hf_config(checkpoint)).layers


def slots_of(checkpoint):
    """Bytes of a token in each layer's cache, where unquantized latents are float32."""
    hf_config = read_hf_config(checkpoint)
    served = RecalkvConfig.from_hf_config(hf_config)
    geometry = AttentionGeometry.from_hf_config(hf_config)
    return [
        token_bytes(served.latent_format(i), layer.rank, 4, geometry.key_scales())
        for i, layer in enumerate(served.layers)
    ]


@pytest.mark.parametrize("latent_dtype", ["bf16", pytest.param("int8", marks=pytest.mark.slow)])
def test_layers_of_one_kind_share_a_cache_group(
    make_small, compressed, small_prompts, latent_dtype
):
    """Gemma's windows, ranks of several sizes; the checkpoint's dense weights tell what is
    right."""
    checkpoint = compressed(make_small("gemma3"), compression=0.5, latent_dtype=latent_dtype)
    assert len({layer.rank for layer in layers_of(checkpoint)}) > 1
    dense, ours = run_engines(
        small_prompts.job(checkpoint, **STOCK),
        small_prompts.job(checkpoint, attention_backend="recalkv"),
    )
    assert ours["metrics"]["kv_cache_groups"] == dense["metrics"]["kv_cache_groups"] == 2
    if latent_dtype == "bf16":
        assert ours["tokens"] == dense["tokens"]


def test_no_byte_of_a_page_is_padding(make_small, compressed, small_prompts):
    """``kfac`` gives equal bytes to all layers, so that half the bytes hold twice the tokens."""
    checkpoint = compressed(
        make_small("gemma3"),
        compression=0.5,
        method="kfac",
        k_group_size=None,
        latent_dtype="bf16",
        target="none",  # a limit of time may leave bytes to a layer that it does not take
        num_samples=16,
    )
    (ours,) = run_engines(small_prompts.job(checkpoint, attention_backend="recalkv"))
    # A block of a group is a page of each layer of one kind; there are as many of both.
    assert ours["metrics"]["kv_cache_groups"] == 2
    block_bytes = BLOCK * sum(slots_of(checkpoint)) // 2
    assert ours["metrics"]["kv_cache_tokens"] == CACHE_BYTES // block_bytes * BLOCK


def test_pages_of_bands_are_within_the_budget(make_small, bands):
    checkpoint = bands(make_small("gemma3"))
    geometry = AttentionGeometry.from_hf_config(read_hf_config(checkpoint))
    slots = slots_of(checkpoint)
    scales = token_bytes(None, 0, 4, geometry.key_scales())
    budget = budget_bytes(0.8, geometry)
    assert 0.9 * budget < len(slots) * (max(slots) - scales) <= budget
