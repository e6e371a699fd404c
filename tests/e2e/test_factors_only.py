"""Factors alone, served on the untouched base model."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from vllm.engine.arg_utils import EngineArgs

from recalkv_vllm.serving.startup.errors import ServingError
from tests.e2e.conftest import run_engines


@pytest.fixture(scope="module")
def base(make_small):
    """Biases and more heads than groups: everything that has an order of heads."""
    return make_small("llama-mha-bias")


@pytest.fixture(scope="module")
def factors(base, compressed):
    return compressed(base, factors_only=True)


def overrides(factors):
    return {
        "architectures": json.loads((factors / "config.json").read_text())["architectures"],
        "recalkv": {"factors": str(factors)},
    }


def refusal(model, **arguments):
    with pytest.raises(ServingError) as caught:
        EngineArgs(model=str(model), enforce_eager=True, **arguments).create_engine_config()
    return str(caught.value)


def test_only_factors_are_written(factors):
    assert {path.name for path in factors.iterdir()} == {
        "README.md", "config.json", "recalkv.safetensors",
    }  # fmt: skip


def test_tokens_equal_the_base_models(base, factors, small_prompts):
    layers = json.loads((factors / "config.json").read_text())["recalkv"]["layers"]
    assert any(layer["head_order"] != sorted(layer["head_order"]) for layer in layers)
    stock, ours = run_engines(
        small_prompts.job(base),
        small_prompts.job(base, attention_backend="recalkv", hf_overrides=overrides(factors)),
    )
    assert ours["tokens"] == stock["tokens"]


def test_another_revision_of_the_base_is_refused(base, factors, tmp_path):
    changed = tmp_path / "base"
    shutil.copytree(base, changed)
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight"][0, 0] += 1
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    message = refusal(changed, hf_overrides=overrides(factors))
    assert "factors of another base model or revision" in message


def test_another_base_is_refused(small, factors):
    message = refusal(small, hf_overrides=overrides(factors))
    assert "factors of another base model: expected AttentionGeometry" in message


def test_factors_without_their_architecture_are_refused(base, factors):
    message = refusal(base, hf_overrides={"recalkv": {"factors": str(factors)}})
    assert "expected the factors' architectures" in message
