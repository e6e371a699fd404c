"""Small random models of every supported architecture, compressed and served."""

import pytest

from recalkv_vllm.architectures import SUPPORTED
from tests.e2e.architectures import CONFIGS
from tests.e2e.conftest import run_engines

#: Windows on some layers and ranks that differ from layer to layer: pages of different sizes.
AT_HALF = "gemma2"


@pytest.fixture(scope="module")
def runs(make_small, compressed, small_prompts):
    """Greedy tokens of stock and compressed engines for each configuration."""
    jobs = []
    for name in CONFIGS:
        base = make_small(name)
        jobs += [
            small_prompts.job(base),
            small_prompts.job(compressed(base), attention_backend="recalkv"),
        ]
    half = compressed(make_small(AT_HALF), compression=0.5, rank_allocation="fisher")
    stock = SUPPORTED[CONFIGS[AT_HALF].model_type].served_name.removeprefix("Recalkv")
    jobs += [
        small_prompts.job(half, hf_overrides={"architectures": [stock]}),
        small_prompts.job(half, attention_backend="recalkv"),
    ]
    results = run_engines(*jobs)
    return {
        name: (stock["tokens"][0], ours["tokens"][0])
        for name, stock, ours in zip([*CONFIGS, "half"], results[::2], results[1::2], strict=True)
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_full_rank_equals_stock(runs, name):
    stock, ours = runs[name]
    assert len({tuple(tokens) for tokens in stock}) == len(stock)
    assert ours == stock


def test_latents_of_half_the_size_give_what_their_dense_form_gives(runs):
    dense, latent = runs["half"]
    assert latent == dense


def test_every_supported_model_type_is_here():
    assert {config.model_type for config in CONFIGS.values()} == set(SUPPORTED)
