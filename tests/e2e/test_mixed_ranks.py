"""Layers of several ranks, with and without windows: cache groups, and tokens of the weights."""

import pytest

from recalkv_vllm.checkpoint import RecalkvConfig, read_hf_config
from tests.e2e.conftest import run_engines


@pytest.mark.parametrize("latent_dtype", ["bf16", pytest.param("int8", marks=pytest.mark.slow)])
def test_layers_of_one_kind_share_a_cache_group(
    make_small, compressed, small_prompts, latent_dtype
):
    """Gemma's windows, ranks as ``kfac`` gives them; the checkpoint's dense weights tell what is
    right."""
    checkpoint = compressed(
        make_small("gemma3"),
        compression=0.5,
        method="kfac",
        k_group_size=None,
        latent_dtype=latent_dtype,
        num_samples=16,
    )
    layers = RecalkvConfig.from_hf_config(read_hf_config(checkpoint)).layers
    assert len({layer.rank for layer in layers}) > 1
    stock = {"hf_overrides": {"architectures": ["Gemma3ForCausalLM"]}}
    dense, ours = run_engines(
        small_prompts.job(checkpoint, **stock),
        small_prompts.job(checkpoint, attention_backend="recalkv"),
    )
    assert ours["metrics"]["kv_cache_groups"] == dense["metrics"]["kv_cache_groups"] == 2
    if latent_dtype == "bf16":
        assert ours["tokens"] == dense["tokens"]
