"""``reload_weights``, as trainers use it: the engine then serves the new model, or says why not."""

import json

import pytest

from tests.e2e.conftest import run_engines

#: Biases, norms of single keys (packed by kernels), and fused projections in the files.
CONFIGS = ("llama-mha-bias", "qwen3", "phi3-short-rope")
PROJECTIONS = r"self_attn\.(k|v|qkv)_proj\.weight"


@pytest.fixture(scope="module")
def pair(make_small, compressed):
    """``pair(name)``: two models of one configuration at half their cache."""
    options = {"compression": 0.5, "rank_allocation": "uniform"}
    return lambda name: [compressed(make_small(name, seed), **options) for seed in (0, 1)]


def files(model):
    return [str(model / name) for name in ("model.safetensors", "recalkv.safetensors")]


@pytest.fixture
def run(small_prompts):
    """``run(old, new, *reloads)``: answers of ``new``, and what an engine of ``old`` gives.

    ``old``'s engine answers at first, and after each reload, whose errors come third.
    """
    scored = {
        "prompts": small_prompts.ids,
        "sampling": {"max_tokens": 24, "ignore_eos": True, "prompt_logprobs": 0},
    }

    def answers(old, new, *reloads):
        batches = [scored]
        for reload in reloads:
            batches += [{"reload": reload}, scored]
        fresh, reloaded = run_engines(
            small_prompts.job(new, scored), small_prompts.job(old, *batches)
        )
        answered = list(zip(reloaded["tokens"], reloaded["outputs"], strict=True))
        errors = [output for _, output in answered[1::2]]
        return (fresh["tokens"][0], fresh["outputs"][0]), answered[::2], errors

    return answers


def assert_same(found, expected):
    """Equal tokens, and log-probabilities of the prompts that are equal but for rounding."""
    assert found[0] == expected[0]
    for ours, theirs in zip(found[1], expected[1], strict=True):
        for here, there in zip(ours["prompt_logprobs"], theirs["prompt_logprobs"], strict=True):
            assert here == pytest.approx(there, abs=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_engine_serves_what_it_reloaded(run, pair, name):
    old, new = pair(name)
    everything = {"send": files(new), "only": rf"^(?!.*{PROJECTIONS})"}
    if name.startswith("phi3"):
        everything = {"path": str(new)}  # its files have queries in a fused projection only
    fresh, (before, read, returned, sent), errors = run(
        old, new, {"path": str(new)}, {"path": str(old)}, everything
    )
    assert errors == [None] * 3
    assert before[0] != fresh[0]
    assert_same(read, fresh)
    assert_same(returned, before)
    assert_same(sent, fresh)


def test_part_of_the_weights_replaces_that_part(run, pair):
    """One factor of each layer is sent, and then the others: what is not sent stays."""
    old, new = pair("llama-mha-bias")
    rest = rf"^(?!.*{PROJECTIONS})(?!layers\.\d+\.k_up)"
    fresh, (before, first, second), errors = run(
        old,
        new,
        {"send": files(new), "only": r"^layers\.\d+\.k_up"},
        {"send": files(new), "only": rest},
    )
    assert errors == [None] * 2
    assert first[0] not in (before[0], fresh[0])
    assert_same(second, fresh)


@pytest.mark.parametrize("name", ["llama-mha-bias", "phi3-short-rope"])
def test_projections_sent_in_place_of_factors_are_refused(run, pair, name):
    old, new = pair(name)
    fresh, (before, refused, reloaded), errors = run(
        old, new, {"send": files(new), "only": PROJECTIONS}, {"path": str(new)}
    )
    projection = "qkv_proj" if name.startswith("phi3") else "k_proj"
    assert errors[1] is None
    assert f"self_attn.{projection}.weight: keys and values are served from factors" in errors[0]
    assert errors[0].endswith("expected layers.N.down, layers.N.k_up, layers.N.v_up in its place")
    assert_same(refused, before)
    assert_same(reloaded, fresh)


def test_a_checkpoint_of_other_ranks_is_refused(run, pair, make_small, compressed):
    old = pair("llama-mha-bias")[0]
    other = compressed(make_small("llama-mha-bias", 1), compression=0.25)
    _, (before, refused), (error,) = run(old, other, {"path": str(other)})
    assert "expected the ranks, spans and latent format that the engine was started with" in error
    assert_same(refused, before)


def test_factors_alone_over_the_base_model(make_small, compressed, small_prompts):
    """Their base model may be read again, and is not replaced by another."""
    base, other = make_small("llama-mha-bias"), make_small("llama-mha-bias", 1)
    factors = compressed(base, factors_only=True)
    overrides = {
        "architectures": json.loads((factors / "config.json").read_text())["architectures"],
        "recalkv": {"factors": str(factors)},
    }
    greedy = small_prompts.job(base)["batches"][0]
    batches = [greedy, {"reload": {}}, greedy, {"reload": {"path": str(other)}}, greedy]
    (result,) = run_engines(small_prompts.job(base, *batches, hf_overrides=overrides))
    before, again, after = result["tokens"][::2]
    assert result["outputs"][1] is None
    assert again == before
    assert "factors of another base model or revision" in result["outputs"][3]
    assert after == before
