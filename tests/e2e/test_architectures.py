"""Small random models of every supported architecture, compressed and served."""

import pytest

from recalkv_vllm.architectures import SUPPORTED
from tests.e2e.architectures import CONFIGS
from tests.e2e.conftest import run_engines
from tests.e2e.more_architectures import MORE_CONFIGS, WITHOUT_PREFIX_CACHING

ALL = {**CONFIGS, **MORE_CONFIGS}
#: Windows on some layers and ranks that differ from layer to layer: pages of different sizes.
AT_HALF = "gemma2"


@pytest.fixture(scope="module")
def names(request) -> list[str]:
    """The configurations that the selected tests ask for."""
    items = [item for item in request.session.items if item.path == request.path]
    return [item.callspec.params["name"] for item in items if hasattr(item, "callspec")]


@pytest.fixture(scope="module")
def runs(names, make_small, compressed, small_prompts):
    """Greedy tokens of stock and compressed engines for each of ``names``."""

    def stock(model, name):
        # vLLM knows some models by another name than transformers gives them.
        served = SUPPORTED[ALL[name].model_type].served_name.removeprefix("Recalkv")
        return small_prompts.job(model, hf_overrides={"architectures": [served]}, **options(name))

    def options(name):
        return {"enable_prefix_caching": False} if name in WITHOUT_PREFIX_CACHING else {}

    jobs = []
    for name in names:
        base = make_small(name)
        # Heads move, where there are several.
        groups = {"k_group_size": min(2, ALL[name].num_key_value_heads)}
        ours = compressed(base, **groups)
        served = small_prompts.job(ours, attention_backend="recalkv", **options(name))
        jobs += [stock(base, name), served]
    half = compressed(make_small(AT_HALF), compression=0.5, rank_allocation="fisher")
    jobs += [stock(half, AT_HALF), small_prompts.job(half, attention_backend="recalkv")]
    results = run_engines(*jobs)
    return {
        name: (stock["tokens"][0], ours["tokens"][0])
        for name, stock, ours in zip([*names, "half"], results[::2], results[1::2], strict=True)
    }


@pytest.mark.parametrize(
    "name", [*CONFIGS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_CONFIGS)]
)
def test_full_rank_equals_stock(runs, name):
    stock, ours = runs[name]
    assert len({tuple(tokens) for tokens in stock}) == len(stock)
    assert ours == stock


def test_latents_of_half_the_size_give_what_their_dense_form_gives(runs):
    dense, latent = runs["half"]
    assert latent == dense


def test_every_supported_model_type_is_here():
    alone = {name for name, entry in SUPPORTED.items() if not entry.multimodal}
    assert {config.model_type for config in ALL.values()} == alone
